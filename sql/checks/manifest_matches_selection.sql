-- Grain: one row an image that is chosen and not in the manifest, the other way round, or told otherwise there.
-- Must be empty when a plan of tars is written, an empty plan too; a run without one has nothing to match.
SELECT image_id, s.part AS selection_part, m.part AS manifest_part, s.sha256 AS selection_sha256,
    m.sha256 AS manifest_sha256
FROM (SELECT * FROM selection WHERE keep) s
FULL JOIN manifest m USING (image_id)
WHERE EXISTS (  -- a table without parts is a view of no file
        SELECT 1 FROM duckdb_views() WHERE view_name = 'export_plan' AND contains(sql, 'read_parquet')
    )
    AND (s.part IS DISTINCT FROM m.part OR s.sha256 IS DISTINCT FROM m.sha256
        OR s.query_id IS DISTINCT FROM m.query_id OR s.cluster IS DISTINCT FROM m.cluster)
ORDER BY image_id;
