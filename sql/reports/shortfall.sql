-- Grain: one row a cluster that holds fewer pictures than a query set asked of it.
-- num_queries of the set in it, num_asked pictures, num_pictures of the pool that it holds after leakage, num_missing.
SELECT query_set, cluster, num_queries, num_asked, num_pictures, num_asked - num_taken AS num_missing
FROM quotas
WHERE num_taken < num_asked
ORDER BY query_set, num_missing DESC, cluster;
