-- Grain: one row for each source of kind pages, depth, and end of a visit.
-- Visits to pages, what they gave, and where they might have led. A page that was visited again counts twice.
SELECT source, depth, coalesce(reason, 'read') AS ended,
    count(*) AS num_visits,
    sum(num_images)::BIGINT AS num_images,
    sum(num_links)::BIGINT AS num_links
FROM pages
GROUP BY source, depth, ended
ORDER BY source, depth, num_visits DESC, ended;
