-- What grows for ever is never read whole: lists of leases go by the time of issue in
-- pages, and indexes of what isn't gone stay as small as that is.
DROP INDEX grants_due;
DROP INDEX grants_host;
DROP INDEX grants_delivery;
DROP INDEX grants_scope;
DROP INDEX grants_program;
-- Of two indexes that serve a query as well SQLite takes the one that was made last: the
-- partial ones, which hold less.
CREATE INDEX grants_gone ON grants (issued, id) WHERE state = 'gone';
CREATE INDEX grants_issued ON grants (issued, id);
CREATE INDEX grants_host ON grants (host_id, issued, id);
CREATE INDEX grants_scope ON grants (scope, issued, id);
CREATE INDEX grants_due ON grants (kind, due) WHERE due > 0;
CREATE INDEX grants_open ON grants (issued, id) WHERE state <> 'gone';
CREATE INDEX grants_open_state ON grants (state, issued, id) WHERE state <> 'gone';
CREATE INDEX grants_open_scope ON grants (scope, issued, id) WHERE state <> 'gone';
CREATE INDEX grants_open_delivery ON grants (host_id, delivery_id) WHERE state <> 'gone';
CREATE INDEX grants_open_program ON grants (host_id, scope, instance) WHERE state <> 'gone';

DROP INDEX hosts_silent;
CREATE INDEX hosts_silent ON hosts (silent_at, id) WHERE silent_at > 0;
CREATE INDEX hosts_name ON hosts (name, id);
CREATE INDEX hosts_proved ON hosts (last_proved, id);

-- What the audit log has of a host's facts, in short: equal ones are not recorded again.
ALTER TABLE hosts ADD COLUMN facts_digest TEXT NOT NULL DEFAULT '';

-- What a decision was made on, in short: an equal one is not written again.
ALTER TABLE decisions ADD COLUMN digest TEXT NOT NULL DEFAULT '';

-- Lists of findings by what they are chosen by, in the order of opening.
DROP INDEX findings_open;
CREATE INDEX findings_detector ON findings (detector, opened);
CREATE INDEX findings_severity ON findings (severity, opened);
CREATE INDEX findings_host ON findings (host_id, opened);

-- How many there are in each state, kept with each change.
CREATE TABLE counts (
	topic TEXT NOT NULL,
	name  TEXT NOT NULL,
	n     BIGINT NOT NULL,
	PRIMARY KEY (topic, name)
);
INSERT INTO counts (topic, name, n) SELECT 'hosts', state, COUNT(*) FROM hosts GROUP BY state;
INSERT INTO counts (topic, name, n) SELECT 'leases', state, COUNT(*) FROM grants GROUP BY state;
INSERT INTO counts (topic, name, n) SELECT 'findings ' || status, severity, COUNT(*) FROM findings GROUP BY status, severity;

CREATE TRIGGER hosts_added AFTER INSERT ON hosts BEGIN
	INSERT INTO counts (topic, name, n) VALUES ('hosts', NEW.state, 1) ON CONFLICT (topic, name) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER hosts_changed AFTER UPDATE OF state ON hosts WHEN OLD.state <> NEW.state BEGIN
	UPDATE counts SET n = n - 1 WHERE topic = 'hosts' AND name = OLD.state;
	INSERT INTO counts (topic, name, n) VALUES ('hosts', NEW.state, 1) ON CONFLICT (topic, name) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER hosts_deleted AFTER DELETE ON hosts BEGIN
	UPDATE counts SET n = n - 1 WHERE topic = 'hosts' AND name = OLD.state;
END;
CREATE TRIGGER grants_added AFTER INSERT ON grants BEGIN
	INSERT INTO counts (topic, name, n) VALUES ('leases', NEW.state, 1) ON CONFLICT (topic, name) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER grants_changed AFTER UPDATE OF state ON grants WHEN OLD.state <> NEW.state BEGIN
	UPDATE counts SET n = n - 1 WHERE topic = 'leases' AND name = OLD.state;
	INSERT INTO counts (topic, name, n) VALUES ('leases', NEW.state, 1) ON CONFLICT (topic, name) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER grants_deleted AFTER DELETE ON grants BEGIN
	UPDATE counts SET n = n - 1 WHERE topic = 'leases' AND name = OLD.state;
END;
CREATE TRIGGER findings_added AFTER INSERT ON findings BEGIN
	INSERT INTO counts (topic, name, n) VALUES ('findings ' || NEW.status, NEW.severity, 1) ON CONFLICT (topic, name) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER findings_changed AFTER UPDATE OF status, severity ON findings WHEN OLD.status <> NEW.status OR OLD.severity <> NEW.severity BEGIN
	UPDATE counts SET n = n - 1 WHERE topic = 'findings ' || OLD.status AND name = OLD.severity;
	INSERT INTO counts (topic, name, n) VALUES ('findings ' || NEW.status, NEW.severity, 1) ON CONFLICT (topic, name) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER findings_deleted AFTER DELETE ON findings BEGIN
	UPDATE counts SET n = n - 1 WHERE topic = 'findings ' || OLD.status AND name = OLD.severity;
END;
