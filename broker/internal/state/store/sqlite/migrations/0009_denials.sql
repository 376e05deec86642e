-- What was taken away, newest last: it is also written to a file outside the store. A row
-- goes when what it names has ended anyway; the file's last number is in generations.
CREATE TABLE denials (
	seq    BIGINT PRIMARY KEY,
	kind   TEXT NOT NULL,
	name   TEXT NOT NULL,
	until  BIGINT NOT NULL,
	lifted INTEGER NOT NULL,
	detail TEXT NOT NULL
);
CREATE UNIQUE INDEX denials_name ON denials (kind, name);
CREATE INDEX denials_until ON denials (until);
