-- What the watch reports, by detector and cause, and the traps it looks for.
CREATE TABLE findings (
	id        TEXT PRIMARY KEY,
	detector  TEXT NOT NULL,
	cause_key TEXT NOT NULL,
	severity  TEXT NOT NULL,
	lease     TEXT NOT NULL,
	host_id   TEXT NOT NULL,
	scope     TEXT NOT NULL,
	account   TEXT NOT NULL,
	status    TEXT NOT NULL,
	opened    BIGINT NOT NULL,
	first     BIGINT NOT NULL,
	last      BIGINT NOT NULL,
	count     BIGINT NOT NULL,
	body      TEXT NOT NULL
);
CREATE UNIQUE INDEX findings_cause ON findings (detector, cause_key);
CREATE UNIQUE INDEX findings_opened ON findings (opened);
-- The risk of a host is read of this index alone, at each request.
CREATE INDEX findings_risk ON findings (host_id, status, scope, severity);
CREATE INDEX findings_status ON findings (status, opened);

CREATE TABLE canaries (
	id        TEXT PRIMARY KEY,
	scope     TEXT NOT NULL,
	username  TEXT NOT NULL,
	audience  TEXT NOT NULL,
	issued    BIGINT NOT NULL,
	issued_by TEXT NOT NULL
);
CREATE UNIQUE INDEX canaries_username ON canaries (username);
