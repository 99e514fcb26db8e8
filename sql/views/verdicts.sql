-- Grain: one row a verdict on a row: (image_id, stage).
-- All verdict tables under one another, with the place of each in the order in which a row meets them.
CREATE OR REPLACE VIEW verdicts AS
SELECT image_id, sha256, 'screened' AS stage, 1 AS place, keep, reason, score, threshold FROM screened
UNION ALL
SELECT image_id, sha256, 'fetched', 2, keep, reason, score, threshold FROM fetched
UNION ALL
SELECT image_id, sha256, 'safety', 3, keep, reason, score, threshold FROM safety
UNION ALL
SELECT image_id, sha256, 'near', 4, keep, reason, score, threshold FROM near
UNION ALL
SELECT image_id, sha256, 'duplicates', 5, keep, reason, score, threshold FROM duplicates
UNION ALL
SELECT image_id, sha256, 'leakage', 6, keep, reason, score, threshold FROM leakage
UNION ALL
SELECT image_id, sha256, 'semantic', 7, keep, reason, score, threshold FROM semantic
UNION ALL
SELECT image_id, sha256, 'selection', 8, keep, reason, score, threshold FROM selection;
