CREATE TABLE meta (
	name  TEXT PRIMARY KEY,
	value TEXT NOT NULL
);

CREATE TABLE hosts (
	id           TEXT PRIMARY KEY,
	name         TEXT NOT NULL,
	state        TEXT NOT NULL,
	state_reason TEXT NOT NULL DEFAULT '',
	admitted     INTEGER NOT NULL DEFAULT 0,
	reenrolling  INTEGER NOT NULL DEFAULT 0,
	tier         TEXT NOT NULL DEFAULT '',
	labels       TEXT NOT NULL DEFAULT '{}',
	reference    TEXT NOT NULL DEFAULT '',
	address      TEXT NOT NULL DEFAULT '',
	ak_public    BLOB,
	tls_key_hash TEXT,
	counters     TEXT NOT NULL DEFAULT '',
	pcrs         TEXT NOT NULL DEFAULT '{}',
	facts        TEXT NOT NULL DEFAULT '{}',
	created      BIGINT NOT NULL,
	last_proved  BIGINT NOT NULL DEFAULT 0,
	silent_at    BIGINT NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX hosts_tls_key ON hosts (tls_key_hash);
CREATE INDEX hosts_silent ON hosts (silent_at);

CREATE TABLE host_eks (
	ek_hash TEXT PRIMARY KEY,
	host_id TEXT NOT NULL REFERENCES hosts (id)
);
CREATE INDEX host_eks_host ON host_eks (host_id);

CREATE TABLE join_tokens (
	hash      TEXT PRIMARY KEY,
	name      TEXT NOT NULL,
	labels    TEXT NOT NULL,
	reference TEXT NOT NULL,
	expires   BIGINT NOT NULL,
	used      BIGINT NOT NULL DEFAULT 0,
	used_by   TEXT NOT NULL DEFAULT ''
);

CREATE TABLE reference_sets (
	name         TEXT NOT NULL,
	version      BIGINT NOT NULL,
	pcrs         TEXT NOT NULL,
	learned_from TEXT NOT NULL,
	created      BIGINT NOT NULL,
	PRIMARY KEY (name, version)
);

CREATE TABLE policies (
	version BIGINT PRIMARY KEY,
	files   TEXT NOT NULL,
	applied BIGINT NOT NULL,
	by_whom TEXT NOT NULL
);

CREATE TABLE operators (
	key_hash TEXT PRIMARY KEY,
	name     TEXT NOT NULL,
	role     TEXT NOT NULL,
	created  BIGINT NOT NULL,
	expires  BIGINT NOT NULL
);

CREATE TABLE grants (
	id          TEXT PRIMARY KEY,
	host_id     TEXT NOT NULL,
	scope       TEXT NOT NULL,
	kind        TEXT NOT NULL,
	state       TEXT NOT NULL,
	delivery_id TEXT NOT NULL,
	instance    TEXT NOT NULL,
	due         BIGINT NOT NULL,
	issued      BIGINT NOT NULL,
	ended       BIGINT NOT NULL DEFAULT 0,
	body        TEXT NOT NULL
);
CREATE INDEX grants_due ON grants (due) WHERE due > 0;
CREATE INDEX grants_host ON grants (host_id, state);
CREATE INDEX grants_delivery ON grants (host_id, delivery_id);
CREATE INDEX grants_scope ON grants (scope, state);

CREATE TABLE decisions (
	host_id TEXT NOT NULL,
	scope   TEXT NOT NULL,
	at      BIGINT NOT NULL,
	result  TEXT NOT NULL,
	facts   TEXT NOT NULL,
	PRIMARY KEY (host_id, scope)
);

CREATE TABLE audit_records (
	idx  BIGINT PRIMARY KEY,
	body BLOB NOT NULL
);
CREATE TABLE audit_hashes (
	idx  BIGINT PRIMARY KEY,
	hash BLOB NOT NULL
);

CREATE TABLE ca_values (
	bucket TEXT NOT NULL,
	name   TEXT NOT NULL,
	value  BLOB NOT NULL,
	PRIMARY KEY (bucket, name)
);
