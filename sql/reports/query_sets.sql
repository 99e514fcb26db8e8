-- Grain: one row a query set, in the order in which the sets were registered.
-- num_images pictures of the set, of which num_queries could be read and asked; num_retrieved different pictures that they
-- asked for, those that a cap cut too; num_final pictures that are in the set for it.
SELECT s.name AS query_set, s.num_rows AS num_images,
    (SELECT count(*) FROM queries q WHERE q.query_set = s.name) AS num_queries,
    (SELECT count(DISTINCT n.image_id) FROM neighbours n WHERE n.query_set = s.name) AS num_retrieved,
    (SELECT count(*) FROM manifest m WHERE m.part = s.name) AS num_final
FROM sources s
WHERE s.role = 'query'
ORDER BY s.source_id;
