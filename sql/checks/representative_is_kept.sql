-- Grain: one row a picture whose representative was not kept by the same verdict, or a kept picture that another
-- represents. Must be empty: a group always leaves its representative, and what a blocked hash names is in no group.
WITH groups AS (
    SELECT image_id, 'near' AS stage, keep, reason, representative_id FROM near
    UNION ALL
    SELECT image_id, 'duplicates', keep, reason, representative_id FROM duplicates
    UNION ALL
    SELECT image_id, 'semantic', keep, reason, representative_id FROM semantic
)
SELECT g.image_id, g.stage, g.reason, g.representative_id, r.keep AS representative_keep
FROM groups g
LEFT JOIN groups r ON r.stage = g.stage AND r.image_id = g.representative_id
WHERE (g.reason IN ('exact_duplicate', 'near_duplicate', 'copy', 'semantic_duplicate') AND NOT coalesce(r.keep, false))
    OR (g.keep AND g.representative_id IS DISTINCT FROM g.image_id)
ORDER BY ALL;
