-- Grain: one row a key, image or bytes that the manifest holds more than once. Must be empty.
-- Bytes are unique among the pictures of the pool; sets that are taken as they are may hold a picture of their own twice.
SELECT 'key' AS what, key AS value, count(*) AS num_rows FROM manifest GROUP BY key HAVING count(*) > 1
UNION ALL
SELECT 'image_id', image_id::VARCHAR, count(*) FROM manifest GROUP BY image_id HAVING count(*) > 1
UNION ALL
SELECT 'sha256', m.sha256, count(*)
FROM manifest m
JOIN sources s ON s.source_id = m.image_id // 1000000000000
WHERE s.role = 'pool'
GROUP BY m.sha256
HAVING count(*) > 1
ORDER BY ALL;
