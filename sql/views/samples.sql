-- Grain: one row a sample of the set: (image_id, copy).
-- The set as it is trained on: a picture once, or, with select.multiset, as often as query sets took it.
CREATE OR REPLACE VIEW samples AS
SELECT c.*, p.* EXCLUDE (image_id, sha256, part, query_id, similarity, cluster)
FROM choices c
JOIN pictures p USING (image_id);
