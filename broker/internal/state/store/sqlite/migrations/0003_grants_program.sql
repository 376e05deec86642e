-- What one program holds, found without reading all that its host or its scope has.
CREATE INDEX grants_program ON grants (host_id, scope, instance);
