scope "web-pki" {
  mode = "observe"
  process {
    exe      = "/usr/sbin/nginx"
    mappings = ["/usr/lib/**", "/lib/*/libc.so.?"]
  }
  when = <<-EOT
    now.getDayOfWeek("Europe/Berlin") in [1, 2, 3, 4, 5]
    && process.user in ["www-data", "root"]
  EOT
  vault {
    path       = "pki/issue/web"
    method     = "write"
    parameters = { common_name = "web.example.com", "ttl" = "24h" }
    ttl        = "24h"
  }
}
