scope "billing-db" {
  description = "Billing reads its own schema"
  owner       = "payments@example.com"
  mode        = "enforce"
  audience    = ["postgres://db1.example.com:5432/billing"]
  reprove     = "15m"
  grace       = "1h"

  host {
    labels    = { env = "prod", role = "billing" }
    tier      = ["certified", "known"]
    reference = "debian12-prod"
  }
  process {
    user         = "billing"
    unit         = "billing.service"
    exe          = "/opt/billing/bin/billingd"
    sha256       = ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
    before_start = true
  }
  when = "!(has(subject.risk) && subject.risk >= 50)"

  vault {
    path    = "database/creds/billing-ro"
    ttl     = "8h"
    overlap = "10m"
  }
}

scope "billing-tls" {
  host { labels = { role = "billing" } }
  process { unit = "billing.service" }
  certificate {
    dns = ["billing.example.com"]
    ips = ["192.0.2.10", "2001:db8::10"]
    ttl = "24h"
  }
}
