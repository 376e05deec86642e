-- Reference sets speak of facts, and are in force once an operator approved them.
ALTER TABLE reference_sets ADD COLUMN content TEXT NOT NULL DEFAULT '';
ALTER TABLE reference_sets ADD COLUMN approved BIGINT NOT NULL DEFAULT 0;
ALTER TABLE reference_sets ADD COLUMN ends BIGINT NOT NULL DEFAULT 0;
UPDATE reference_sets SET content = '{"pcrs":' || pcrs || '}', approved = created;
ALTER TABLE reference_sets DROP COLUMN pcrs;

CREATE TABLE reference_maintenance (
	name TEXT PRIMARY KEY,
	ends BIGINT NOT NULL
);

CREATE TABLE releases (
	name    TEXT NOT NULL,
	version BIGINT NOT NULL,
	source  TEXT NOT NULL,
	files   TEXT NOT NULL,
	added   BIGINT NOT NULL,
	ends    BIGINT NOT NULL,
	PRIMARY KEY (name, version)
);
