-- Grain: one row a host of the pool; null stands for local files and lines without a host.
-- Lines of the host, how many were tried, gave bytes, are in the set, and what ended most of the others; then what the
-- host made of being asked. robots: lines that robots.txt denied, or let wait too long, or that were left because it could
-- not be had. failures: lines by failure class. Visits are counted where they went: a redirect to another host counts there.
WITH lines AS (
    SELECT e.host,
        count(*) AS num_lines,
        count(i.image_id) AS num_tried,
        count(*) FILTER (WHERE e.stage NOT IN ('screened', 'fetched', 'pending')) AS num_fetched,
        count(*) FILTER (WHERE e.stage = 'kept') AS num_kept,
        mode(e.reason ORDER BY e.reason) AS main_reason,
        coalesce(sum(i.num_bytes), 0)::BIGINT AS num_bytes,
        count(*) FILTER (WHERE i.reason IN ('robots_denied', 'robots_unreachable', 'crawl_delay')) AS num_robots,
        count(*) FILTER (WHERE i.opt_out IS NOT NULL) AS num_opt_out,
        count(*) FILTER (WHERE i.transient) AS num_transient
    FROM end_state e
    LEFT JOIN images i USING (image_id)
    WHERE e.role = 'pool'
    GROUP BY e.host
),
failures AS (
    SELECT host, string_agg(reason || ' ' || num_rows, ', ' ORDER BY num_rows DESC, reason) AS failures
    FROM (
        SELECT e.host, i.reason, count(*) AS num_rows
        FROM end_state e
        JOIN images i USING (image_id)
        WHERE e.role = 'pool' AND NOT i.ok
        GROUP BY e.host, i.reason
    )
    GROUP BY host
),
visits AS (
    SELECT host,
        count(*) AS num_visits,
        count(*) FILTER (WHERE http_status = 429) AS num_429,
        median(elapsed_s) AS median_s
    FROM (
        SELECT lower(regexp_extract(url, '^[A-Za-z]+://(?:[^/?#]*@)?(\[[^\]]*\]|[^/:?#]*)', 1)) AS host, http_status, elapsed_s
        FROM fetch_log
    )
    GROUP BY host
)
SELECT l.host, l.num_lines, l.num_tried, l.num_fetched, l.num_kept, l.main_reason, f.failures, l.num_transient, l.num_robots,
    l.num_opt_out, l.num_bytes, coalesce(v.num_visits, 0) AS num_visits, coalesce(v.num_429, 0) AS num_429,
    round(v.median_s, 4) AS median_s
FROM lines l
LEFT JOIN failures f ON f.host IS NOT DISTINCT FROM l.host
LEFT JOIN visits v ON v.host = l.host
ORDER BY l.num_lines DESC, l.host;
