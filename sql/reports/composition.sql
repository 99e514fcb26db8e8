-- Grain: one row a part of the set, largest first.
-- The view composition: pictures, share, blurred pictures, queries that were answered, sizes.
SELECT * FROM composition ORDER BY num_pictures DESC, part;
