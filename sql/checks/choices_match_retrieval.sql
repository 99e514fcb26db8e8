-- Grain: one row a query set with another number of samples than pictures that it took. Must be empty.
-- In a multiset, where some picture has a second sample, each set has a sample for each time that it took a picture. Else
-- a picture that several ask for is the first one's, and a set has at most as many.
SELECT r.query_set, coalesce(r.num_taken, r.num_queries) AS num_taken, count(c.image_id) AS num_samples
FROM retrieval r
LEFT JOIN choices c ON c.part = r.query_set
GROUP BY ALL
HAVING count(c.image_id) > coalesce(r.num_taken, r.num_queries)
    OR (count(c.image_id) < coalesce(r.num_taken, r.num_queries) AND EXISTS (SELECT 1 FROM choices WHERE copy > 0))
ORDER BY r.query_set;
