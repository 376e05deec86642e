-- How often an operator asked for a host's logs from their first entry.
ALTER TABLE hosts ADD COLUMN step_ups BIGINT NOT NULL DEFAULT 0;

-- How often each topic was changed, for caches, and who works on what until when.
CREATE TABLE generations (
	topic TEXT PRIMARY KEY,
	n     BIGINT NOT NULL
);
CREATE TABLE claims (
	name  TEXT PRIMARY KEY,
	owner TEXT NOT NULL,
	until BIGINT NOT NULL
);
