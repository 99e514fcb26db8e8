-- Grain: one row a (stage, reason) that ended lines of the pool; kept and pending are stages without a reason.
-- How many lines ended there, and their share of all lines of the pool.
SELECT stage, reason, count(*) AS num_lines, count(*) / sum(count(*)) OVER () AS share
FROM end_state
WHERE role = 'pool'
GROUP BY stage, reason
ORDER BY num_lines DESC, stage, reason;
