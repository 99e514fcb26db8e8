-- Grain: one row a picture whose samples are not those of its verdict. Must be empty.
-- What is kept has copies 0, 1, ... without a gap, copy 0 for whom the verdict says; what is dropped has none.
WITH samples_of AS (
    SELECT image_id, count(*) AS num_samples, count(DISTINCT copy) AS num_copies, max(copy) AS last_copy,
        min_by(struct_pack(sha256, part, query_id, similarity, cluster), copy) AS first
    FROM choices
    GROUP BY image_id
)
SELECT image_id, coalesce(s.keep, false) AS keep, s.part AS selection_part, c.first.part AS first_part,
    coalesce(c.num_samples, 0) AS num_samples
FROM selection s
FULL JOIN samples_of c USING (image_id)
WHERE coalesce(s.keep, false) <> (c.num_samples IS NOT NULL)
    OR c.num_copies <> c.num_samples
    OR c.last_copy <> c.num_samples - 1
    OR (s.keep AND c.first IS DISTINCT FROM struct_pack(
        sha256 := s.sha256, part := s.part, query_id := s.query_id, similarity := s.similarity, cluster := s.cluster
    ))
ORDER BY image_id;
