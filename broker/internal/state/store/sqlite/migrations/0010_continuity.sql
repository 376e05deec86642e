-- What a host's next proof continues from: the number that its last proof showed, the
-- highest number that is of a branch it has left, and the highest that it was given.
ALTER TABLE hosts ADD COLUMN shown BIGINT NOT NULL DEFAULT 0;
ALTER TABLE hosts ADD COLUMN left_behind BIGINT NOT NULL DEFAULT 0;
ALTER TABLE hosts ADD COLUMN given BIGINT NOT NULL DEFAULT 0;
