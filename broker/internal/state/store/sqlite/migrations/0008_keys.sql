-- A host is found by its attestation key, too.
CREATE INDEX hosts_ak ON hosts (ak_public);
