-- Grain: one row a chosen picture.
-- The set: where each picture came from, which set asked for it, and what it looks like.
CREATE OR REPLACE VIEW pictures AS
SELECT s.image_id, u.source, u.line, u.url, u.page_url, u.alt_text, u.label, s.sha256, s.part, s.query_id, s.similarity,
    s.cluster, h.width_px, h.height_px, i.format, i.num_bytes, d.num_faces, d.num_faces > 0 AND d.blurred_object IS NOT NULL AS blurred
FROM selection s
JOIN urls u USING (image_id)
LEFT JOIN images i USING (image_id)
LEFT JOIN hashes h USING (image_id)
LEFT JOIN detections d USING (image_id)
WHERE s.keep;
