-- Grain: one row a cluster of the embeddings.
-- Pictures of the pool that lie in it after leakage, query pictures that lie in it, pictures of the pool that were chosen
-- from it, and the mean cosine of its pictures to the centroid.
SELECT c.cluster,
    count(*) FILTER (WHERE r.role = 'pool') AS num_pool,
    count(*) FILTER (WHERE r.role = 'query') AS num_queries,
    count(*) FILTER (WHERE r.role = 'pool' AND s.keep) AS num_chosen,
    avg(c.similarity) AS mean_similarity
FROM clusters c
JOIN sources r ON r.source_id = c.image_id // 1000000000000
LEFT JOIN selection s USING (image_id)
GROUP BY c.cluster
ORDER BY num_pool DESC, c.cluster;
