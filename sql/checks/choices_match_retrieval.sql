-- Grain: one row a query set with another number of samples than pictures that it took. Must be empty.
-- In a multiset, where some picture has a second sample, each set has a sample for each time that it took a picture. Else
-- a picture that several ask for is the first one's, and a set has at most as many.
WITH taken AS (
    SELECT query_set, coalesce(num_taken, num_queries - coalesce(num_test_matches, 0)) AS num_taken FROM retrieval
)
SELECT t.query_set, t.num_taken, count(c.image_id) AS num_samples
FROM taken t
LEFT JOIN choices c ON c.part = t.query_set
GROUP BY ALL
HAVING count(c.image_id) > t.num_taken
    OR (count(c.image_id) < t.num_taken AND EXISTS (SELECT 1 FROM choices WHERE copy > 0))
ORDER BY t.query_set;
