-- Grain: one row a line that the run has not judged to its end. Must be empty when a run is through.
SELECT image_id, source, role, line, url FROM end_state WHERE stage = 'pending' ORDER BY image_id;
