-- Grain: one row a threshold, edges.floor and the hundredths above it; in_use marks duplicates.threshold.
-- num_edges count at it and make num_components of two or more out of num_pictures; policy component would drop all but one
-- of each, num_dropped; largest is the size of the largest. Shares are of all pictures that near left.
WITH pool AS (SELECT sum(size * num_components)::BIGINT AS num_entered FROM component_sizes)
SELECT threshold, in_use, num_edges, num_components, num_pictures,
    num_dropped, coalesce(num_dropped / num_entered, 0) AS share_dropped,
    largest, coalesce(largest / num_entered, 0) AS share_largest
FROM component_sweep, pool
ORDER BY threshold;
