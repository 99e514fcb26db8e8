-- Grain: one row a line of a source of this run (urls), broken lines too.
-- Where each line ended. stage: the first verdict that dropped it, with its reason, score and threshold; else
--   kept       it is in the set
--   reference  a picture of a benchmark, or of a query set that is not taken as it is: it is compared with, never chosen
--   pending    the run has not judged it to the end
-- Pictures of benchmarks and query sets meet screened, fetched and safety; those of as-is sets then meet selection.
CREATE OR REPLACE VIEW end_state AS
WITH lines AS (
    SELECT u.image_id, u.source, s.role, u.line, u.url, u.host, coalesce(q.mode = 'as_is', false) AS as_is,
        q.query_id IS NOT NULL AS is_query
    FROM urls u
    JOIN sources s ON s.source_id = u.image_id // 1000000000000
    LEFT JOIN queries q ON q.query_id = u.image_id
),
judged AS (
    SELECT image_id,
        min(place) FILTER (WHERE NOT keep) AS dropped_at,
        min_by(struct_pack(stage, reason, score, threshold), place) FILTER (WHERE NOT keep) AS dropped,
        coalesce(bool_or(keep AND place = 3), false) AS is_safe,
        coalesce(bool_or(keep AND place = 8), false) AS is_selected
    FROM verdicts
    GROUP BY image_id
),
ends AS (
    SELECT l.*, j.dropped,
        CASE
            WHEN j.image_id IS NULL THEN 'pending'
            WHEN l.role = 'pool' OR l.as_is THEN
                CASE WHEN j.dropped_at IS NOT NULL THEN 'dropped' WHEN j.is_selected THEN 'kept' ELSE 'pending' END
            WHEN j.dropped_at <= 3 THEN 'dropped'
            WHEN j.is_safe AND (l.role = 'benchmark' OR l.is_query) THEN 'reference'
            ELSE 'pending'
        END AS outcome
    FROM lines l
    LEFT JOIN judged j USING (image_id)
)
SELECT image_id, source, role, line, url, host,
    CASE WHEN outcome = 'dropped' THEN dropped.stage ELSE outcome END AS stage,
    CASE WHEN outcome = 'dropped' THEN dropped.reason END AS reason,
    CASE WHEN outcome = 'dropped' THEN dropped.score END AS score,
    CASE WHEN outcome = 'dropped' THEN dropped.threshold END AS threshold
FROM ends;
