-- Grain: one row a host of the pool; null stands for local files and lines without a host.
-- Lines of the host, how many gave bytes, how many are in the set, and what ended most of the others.
SELECT host,
    count(*) AS num_lines,
    count(*) FILTER (WHERE stage NOT IN ('screened', 'fetched', 'pending')) AS num_fetched,
    count(*) FILTER (WHERE stage = 'kept') AS num_kept,
    mode(reason ORDER BY reason) AS main_reason
FROM end_state
WHERE role = 'pool'
GROUP BY host
ORDER BY num_lines DESC, host;
