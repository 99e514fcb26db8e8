-- Grain: one row a picture that was dropped because a benchmark holds it too, the most similar first.
-- Its address and source, the picture of the benchmark that decided, their similarity, and via_id where the two are joined by
-- another picture of its component. A picture of a set that is taken as it is has the reason test_match.
SELECT l.image_id,
    coalesce(u.url, u.location) AS address,
    u.source,
    v.reason,
    l.similarity,
    b.source AS benchmark,
    l.reference_id,
    coalesce(b.url, b.location) AS reference,
    nullif(l.via_id, l.image_id) AS via_id
FROM leaks l
JOIN verdicts v USING (image_id)
JOIN urls u USING (image_id)
LEFT JOIN urls b ON b.image_id = l.reference_id
WHERE v.reason IN ('leak', 'test_match')
ORDER BY l.similarity DESC, l.image_id;
