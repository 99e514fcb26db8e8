-- Grain: one row a line whose number of end states is not one. Must be empty.
-- No line is lost and none is counted twice.
SELECT u.image_id, count(e.image_id) AS num_end_states
FROM urls u
LEFT JOIN end_state e USING (image_id)
GROUP BY u.image_id
HAVING count(e.image_id) <> 1
ORDER BY u.image_id;
