-- Grain: one row for pool against pool, and one for pool against benchmarks where there are any.
-- num_sampled of the num_pictures that near left were searched exactly, and found num_edges from the threshold on; num_found
-- of these pairs are stored, which is the recall; recall_at_least is its lower bound with 95 % confidence.
SELECT kind, threshold, num_pictures, num_sampled, num_edges, num_found, recall, recall_at_least
FROM edge_recall
ORDER BY kind DESC;
