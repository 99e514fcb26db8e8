-- Grain: one row a part of the set: the query set that chose its pictures.
-- How many samples each part has, of how many pictures, its share of the set, and what its samples look like.
CREATE OR REPLACE VIEW composition AS
SELECT part,
    count(*) AS num_samples,
    count(DISTINCT image_id) AS num_pictures,
    count(*) / sum(count(*)) OVER () AS share,
    count(*) FILTER (WHERE blurred) AS num_blurred,
    count(DISTINCT query_id) AS num_queries,
    avg(similarity) AS mean_similarity,
    median(width_px)::INTEGER AS median_width_px,
    median(height_px)::INTEGER AS median_height_px,
    sum(num_bytes)::BIGINT AS num_bytes
FROM samples
GROUP BY part;
