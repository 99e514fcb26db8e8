-- Grain: one row a part of the set, largest first.
-- The view composition: samples, pictures, share, blurred ones, queries that were answered, sizes.
SELECT * FROM composition ORDER BY num_samples DESC, part;
