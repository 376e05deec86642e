scope "billing-db" {
  description = "Billing reads its own schema"
  owner       = "payments@example.com"
  audience    = ["postgres://db1.example.com:5432/billing"]
  reprove     = "15m"
  grace       = "1h"

  host {
    labels = { role = "billing" }
    tier   = ["certified", "known"]
  }
  process {
    user         = "billing"
    unit         = "billing.service"
    exe          = "/opt/billing/bin/billingd"
    before_start = true
  }

  vault {
    path    = "database/creds/billing-ro"
    ttl     = "8h"
    overlap = "10m"
  }
}

scope "billing-tls" {
  host    { labels = { role = "billing" } }
  process { unit = "billing.service" }

  certificate {
    dns = ["billing.example.com"]
    ttl = "24h"
  }
}
