-- Grain: one row a sample whose picture has faces that were blurred and whose tar holds the original, or the reverse.
-- Must be empty. A blurred version without faces is used only where the original was purged.
SELECT m.key, m.image_id, m.blurred, d.blurred_object
FROM manifest m
LEFT JOIN detections d USING (image_id)
WHERE (d.blurred_object IS NOT NULL AND d.num_faces > 0 AND NOT m.blurred)
    OR (m.blurred AND d.blurred_object IS NULL)
    OR (m.blurred AND m.size <> d.blurred_bytes)
    OR d.image_id IS NULL
ORDER BY m.key;
