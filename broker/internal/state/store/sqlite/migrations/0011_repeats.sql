-- What a host caused again and again, such as one refusal: its first record, and what
-- came since. A row is rewritten in its place.
CREATE TABLE repeats (
	host_id TEXT NOT NULL,
	what    TEXT NOT NULL,
	record  BIGINT NOT NULL,
	first   BIGINT NOT NULL,
	last    BIGINT NOT NULL,
	n       BIGINT NOT NULL,
	body    TEXT NOT NULL,
	PRIMARY KEY (host_id, what)
);
CREATE INDEX repeats_by_first ON repeats (first, host_id, what);
