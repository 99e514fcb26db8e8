-- Grain: one row a size of a component of copies, at the threshold in use. A component of N pictures keeps one (policy
-- component), so num_dropped of this size went.
SELECT size,
    num_components,
    size * num_components AS num_pictures,
    (size - 1) * num_components AS num_dropped
FROM component_sizes
ORDER BY size;
