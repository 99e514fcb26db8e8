-- Grain: one row a size of a component of copies, at the threshold in use; size 1: pictures that are nobody's copy.
-- num_pictures are in the num_components of this size; share is of all pictures that near left.
SELECT size, num_components, size * num_components AS num_pictures,
    size * num_components / sum(size * num_components) OVER () AS share
FROM component_sizes
ORDER BY size;
