-- Grain: one row a key, image or bytes that the manifest holds too often. Must be empty.
-- A key is there once, a picture as often as it was chosen. Bytes are of one picture among those of the pool; sets that are
-- taken as they are may hold a picture of their own twice.
SELECT 'key' AS what, key AS value, count(*) AS num_rows FROM manifest GROUP BY key HAVING count(*) > 1
UNION ALL
SELECT 'image_id', image_id::VARCHAR, m.num_rows
FROM (SELECT image_id, count(*) AS num_rows FROM manifest GROUP BY image_id) m
LEFT JOIN (SELECT image_id, count(*) AS num_samples FROM choices GROUP BY image_id) c USING (image_id)
WHERE m.num_rows > coalesce(c.num_samples, 1)
UNION ALL
SELECT 'sha256', m.sha256, count(*)
FROM manifest m
JOIN sources s ON s.source_id = m.image_id // 1000000000000
WHERE s.role = 'pool'
GROUP BY m.sha256
HAVING count(DISTINCT m.image_id) > 1
ORDER BY ALL;
