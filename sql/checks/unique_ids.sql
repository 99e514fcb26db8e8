-- Grain: one row an (image_id, table) that stands there more than once. Must be empty.
WITH ids AS (
    SELECT image_id, 'urls' AS "table" FROM urls
    UNION ALL SELECT image_id, 'images' FROM images
    UNION ALL SELECT image_id, 'hashes' FROM hashes
    UNION ALL SELECT image_id, 'detections' FROM detections
    UNION ALL SELECT image_id, 'descriptors' FROM descriptors
    UNION ALL SELECT image_id, 'embeddings' FROM embeddings
    UNION ALL SELECT image_id, 'clusters' FROM clusters
    UNION ALL SELECT query_id, 'queries' FROM queries
    UNION ALL SELECT image_id, stage FROM verdicts
)
SELECT image_id, "table", count(*) AS num_rows FROM ids GROUP BY ALL HAVING count(*) > 1 ORDER BY ALL;
