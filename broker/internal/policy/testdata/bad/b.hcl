scope "twice" {
  process { user = "a" }
  vault {
    path   = "kv/data/*"
    method = "list"
    ttl    = "1h"
  }
}
scope "twice" {
  process {}
  process = { user = "a" }
  certificate {
    dns = ["localhost", "*.example.com", "broker.example.com", "10.0.0.1", "ok.example.com", "ok.example.com"]
    ips = ["127.0.0.1", "2001:DB8::1", "192.0.2.1"]
    ttl = "${8}h"
  }
}
scope "user-unit" {
  reprove = "2h"
  process {
    unit = "user@1000.service"
  }
  when = <<EOT
host.tier == "known" &&
  process.usr == "x"
EOT
  vault {
    path = "database/creds/countersign-admin"
    ttl = "1h"
  }
}
scope {
}
scope "number" {
  process {
    before_start = true
    user = [for x in ["a"] : x]
  }
  when = "host.pcrs"
  vault {
    path = "a/b"
    ttl  = upper("1h")
  }
}
