-- Grain: one row a row of a per-shard table that lies in the part of another shard. Must be empty.
-- Part N holds ids of shard N only, so that what is done for one shard never reads another.
SELECT "table", image_id, part FROM places WHERE image_id // 1000000 <> part ORDER BY ALL;
