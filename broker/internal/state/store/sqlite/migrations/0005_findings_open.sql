-- Open findings are counted by severity without reading them.
CREATE INDEX findings_open ON findings (status, severity);
