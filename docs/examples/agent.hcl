broker {
  addresses = ["https://broker-a.example.com:8443", "https://broker-b.example.com:8443"]
  ca_sha256 = "0000000000000000000000000000000000000000000000000000000000000000" # `countersign broker init` prints it
}

# witness = true # tell the broker which other programs open the files; needs the drop-in witness.conf

credential "billing-db" {
  process { unit = "billing.service" }

  file "/etc/billing/db.properties" {
    template = "user={{ .username | properties }}\npassword={{ .password | properties }}\n"
    owner    = "billing"
    group    = "billing"
    mode     = "0400"
  }

  on_change { signal = "SIGHUP" }
}

credential "billing-tls" {
  key = "p256" # made on this host; the broker sees a request for it
  process { unit = "billing.service" }

  file "/etc/billing/tls.key" {
    template = "{{ .private_key | pem }}"
    owner    = "billing"
  }
  file "/etc/billing/tls.crt" {
    template = "{{ .chain | pem }}"
    owner    = "billing"
    mode     = "0440"
  }

  on_change { reload = true }
}
