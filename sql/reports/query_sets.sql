-- Grain: one row a query set, in the order of the recipe.
-- num_images pictures of the set, of which num_queries could be read and asked. num_nominal pictures that it asked for,
-- num_final_nominal those that its cap would leave; num_retrieved pictures that the pool gave, num_taken those that the cap
-- left, num_unique different ones of these; num_short clusters that hold fewer than was asked of them (report shortfall).
-- recall: share of the neighbours of num_sampled queries that the search found. num_final samples that are in the set for
-- it: those that it took, num_taken, in a multiset; else different pictures, of which one that several sets asked for
-- counts for the first. num_test_matches pictures of a set taken as it is match a benchmark and are left out (report leaks).
SELECT coalesce(s.name, r.query_set) AS query_set, r.mode,
    s.num_rows AS num_images,
    CASE WHEN s.name IS NOT NULL THEN (SELECT count(*) FROM queries q WHERE q.query_set = s.name) END AS num_queries,
    r.num_clusters, r.num_nominal, r.num_final_nominal, r.num_retrieved, r.num_taken, r.num_unique, r.num_collisions,
    r.shortfall, r.num_short, r.num_test_matches, r.num_sampled, r.recall,
    (SELECT count(*) FROM manifest m WHERE m.part = coalesce(s.name, r.query_set)) AS num_final
FROM (SELECT * FROM sources WHERE role = 'query') s
FULL JOIN retrieval r ON r.query_set = s.name
ORDER BY r.place, s.source_id;
