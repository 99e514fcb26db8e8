-- Grain: one row a (image_id, verdict) that the verdict misses, or judges though the one before did not keep it.
-- Must be empty: each verdict covers exactly the rows that the one before it kept. Verdicts that have not run are left out.
-- Query sets and benchmarks meet screened, fetched and safety; query sets then meet selection.
WITH met AS (
    SELECT v.image_id, v.stage, v.keep, s.role,
        CASE WHEN s.role <> 'pool' AND v.place = 8 THEN 4 ELSE v.place END AS place
    FROM verdicts v
    JOIN sources s ON s.source_id = v.image_id // 1000000000000
),
has_run AS (SELECT DISTINCT role, place, stage FROM met),
expected AS (
    SELECT m.image_id, r.stage
    FROM met m
    JOIN has_run r ON r.role = m.role AND r.place = m.place + 1
    WHERE m.keep
    UNION ALL
    SELECT u.image_id, r.stage
    FROM urls u
    JOIN sources s ON s.source_id = u.image_id // 1000000000000
    JOIN has_run r ON r.role = s.role AND r.place = 1
)
SELECT image_id, stage, e.image_id IS NULL AS unexpected
FROM (SELECT * FROM expected) e
FULL JOIN (SELECT image_id, stage FROM met) m USING (image_id, stage)
WHERE e.image_id IS NULL OR m.image_id IS NULL
ORDER BY ALL;
