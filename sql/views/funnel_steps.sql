-- Grain: one row a (role, verdict, reason); reason is null for the rows that the verdict kept.
-- What each verdict did with the rows that it met: role pool for the pool, as_is for sets that are taken as they are.
CREATE OR REPLACE VIEW funnel_steps AS
SELECT CASE WHEN s.role = 'pool' THEN 'pool' ELSE 'as_is' END AS role, v.place, v.stage,
    CASE WHEN NOT v.keep THEN v.reason END AS reason, count(*) AS num_rows
FROM verdicts v
JOIN sources s ON s.source_id = v.image_id // 1000000000000
LEFT JOIN queries q ON q.query_id = v.image_id
WHERE s.role = 'pool' OR (q.mode = 'as_is' AND v.stage = 'selection')
GROUP BY ALL;
