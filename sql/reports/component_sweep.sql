-- Grain: one row a threshold of the copy descriptor, from the floor of the stored edges on: what duplicates.threshold
-- would make of them by policy component, without a new search. share_dropped is of the pictures that near kept.
SELECT threshold,
    num_edges,
    num_components,
    num_pictures,
    num_dropped,
    num_dropped / nullif((SELECT count(*) FROM near WHERE keep), 0) AS share_dropped,
    largest,
    in_use
FROM component_sweep
ORDER BY threshold;
