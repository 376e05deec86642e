scope "Billing DB" {
  ownr  = "payments@example.com"
  mode  = "enforced"
  audience = ["db1.example.com", "postgres://u:p@db1.example.com/x"]
  reprove = "1s"
  grace   = "an hour"
  hosts {
    labels = { env = "prod" }
  }
  process {
    user   = ""
    unit   = "billing"
    exe    = "/opt/billing/../billingd"
    sha256 = ["9F86", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08x"]
    before_strat = true
    mappings = ["lib/**"]
  }
  when = "subject.risq > 5 && host.lables.env == 'x'"
  vault {
    path    = "sys/raw"
    overlap = "9h"
    ttl     = "8h"
    parameters = { a = "b" }
  }
}

scope "no-process" {
  host {
    tier        = ["certifed"]
    secure_boot = "yes"
    ima         = "optional"
    labels      = ["env"]
  }
  vault {
    path = "database/../sys/x"
    ttl  = 8
  }
  certificate {
    ttl = "30s"
  }
}
