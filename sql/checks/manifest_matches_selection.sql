-- Grain: one row a sample that is chosen and not in the manifest, the other way round, or told otherwise there.
-- Must be empty when a plan of tars is written, an empty plan too; a run without one has nothing to match.
WITH chosen AS (SELECT image_id, sha256, part, query_id, cluster FROM choices),
told AS (SELECT image_id, sha256, part, query_id, cluster FROM manifest)
SELECT *
FROM (
    SELECT *, 'not in the manifest' AS problem FROM (FROM chosen EXCEPT ALL FROM told)
    UNION ALL
    SELECT *, 'not chosen' FROM (FROM told EXCEPT ALL FROM chosen)
)
WHERE EXISTS (  -- a table without parts is a view of no file
    SELECT 1 FROM duckdb_views() WHERE view_name = 'export_plan' AND contains(sql, 'read_parquet')
)
ORDER BY ALL;
