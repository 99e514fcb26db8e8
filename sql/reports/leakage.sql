-- Grain: one row a benchmark, in the order of registration.
-- Of num_images pictures of the benchmark, num_matched were found in the pool or in a set that is taken as it is; share is
-- num_matched of num_images. num_dropped pictures were dropped for it: num_direct of them have an edge to it themselves,
-- num_through are dropped for another picture of their component; num_as_is are of sets that are taken as they are.
-- Similarities are of the edges that decided. A picture that several benchmarks touch counts for the one that decided.
WITH dropped AS (
    SELECT l.*, v.stage
    FROM leaks l
    JOIN verdicts v USING (image_id)
    WHERE v.reason IN ('leak', 'test_match')
)
SELECT s.name AS benchmark,
    s.num_rows AS num_images,
    count(DISTINCT d.reference_id) AS num_matched,
    count(DISTINCT d.reference_id) / nullif(s.num_rows, 0) AS share,
    count(d.image_id) AS num_dropped,
    count(d.image_id) FILTER (WHERE d.stage = 'leakage' AND d.via_id = d.image_id) AS num_direct,
    count(d.image_id) FILTER (WHERE d.stage = 'leakage' AND d.via_id <> d.image_id) AS num_through,
    count(d.image_id) FILTER (WHERE d.stage = 'selection') AS num_as_is,
    max(d.similarity) AS max_similarity,
    median(d.similarity) AS median_similarity
FROM sources s
LEFT JOIN dropped d ON d.reference_id // 1000000000000 = s.source_id
WHERE s.role = 'benchmark'
GROUP BY s.source_id, s.name, s.num_rows
ORDER BY s.source_id;
