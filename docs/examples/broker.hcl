state_dir      = "/var/lib/countersign"
listen         = "[::]:8443"
names          = ["broker-a.example.com"]          # what agents dial
trust_domain   = "example.com"                     # of spiffe:// URIs in certificates
metrics_listen = "[::]:9464"                       # /metrics, /healthz, /readyz, /crl
ek_roots       = ["/etc/countersign/ek-roots.pem"] # TPM vendors' roots and intermediates
denial_log     = "/mnt/second-disk/denials.log"    # what was taken away, for a restore; default: in state_dir
keep_ended     = "2160h"                           # leases, after their end; the audit log keeps them for good

vault {
  address = "https://vault.example.com:8200"
  ca_file = "/etc/countersign/vault-ca.pem"

  approle {
    role_id        = "db02de05-fa39-4855-059b-67221c5c2f63"
    secret_id_file = "/etc/countersign/vault-secret-id"
  }
}

ca {
  crl_url = "http://broker-a.example.com:9464/crl"
}
