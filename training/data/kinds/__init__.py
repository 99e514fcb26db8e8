"""The kinds of parts: each gives shards, and the rows of a shard."""
