state_dir      = "/var/lib/countersign-watch"
metrics_listen = "127.0.0.1:9465"

# Accounts that only the broker hands out, beside those that it issued.
governed = ["svc-*"]

# NATs and poolers, from which any host may come.
through = ["10.1.250.0/28"]

broker {
  address   = "https://broker-a.example.com:8443"
  ca_sha256 = "7c1e2d0f8b5a4c3d9e6f1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d"
  cert      = "/etc/countersign/watch.crt" # operator add watch --role responder
  key       = "/etc/countersign/watch.key"
}

sensor "postgres-csv" "db1" {
  path = "/var/log/postgresql/*.csv"
}

sensor "vault-audit" "vault" {
  listen = "unix:///run/countersign-watch/vault.sock" # vault audit enable socket address=… socket_type=unix
}

sensor "sshd" "jump" {
  journal = "/var/log/journal"
}

sensor "ocsf" "siem" {
  listen     = "http://127.0.0.1:9466"
  token_file = "/etc/countersign/siem-token"
}

response "foreign-source" {
  action = "quarantine"
  scopes = ["payments-db"]
}

webhook "https://soc.example.com/countersign" {
  key_file = "/etc/countersign/webhook-key"
  format   = "ocsf"
}

syslog {
  address = "udp://127.0.0.1:514"
}
