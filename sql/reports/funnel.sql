-- Grain: one row a verdict, in the order in which rows meet them; rows of the pool only.
-- num_in rows came, num_dropped went, num_left go on; share is num_left of all lines of the pool.
SELECT stage,
    sum(num_rows)::BIGINT AS num_in,
    coalesce(sum(num_rows) FILTER (WHERE reason IS NOT NULL), 0)::BIGINT AS num_dropped,
    coalesce(sum(num_rows) FILTER (WHERE reason IS NULL), 0)::BIGINT AS num_left,
    coalesce(sum(num_rows) FILTER (WHERE reason IS NULL), 0) / first(sum(num_rows)) OVER (ORDER BY place) AS share
FROM funnel_steps
WHERE role = 'pool'
GROUP BY place, stage
ORDER BY place;
