"""Tables of queries, of what they ask for and of what is chosen."""

import pyarrow as pa

from curation.schema.table import ID, SHA, VERDICT, Table, columns

TABLES = (
    Table(
        name="queries",
        root="run",
        kind="output",
        row="one query picture; part = shard of its query set",
        schema=columns(
            ("query_id", pa.int64(), "its image_id"),
            ("query_set", pa.string(), "name of the set"),
            ("mode", pa.string(), "as_is | sample | cluster"),
            ("k", pa.int32(), "neighbours asked for (mode sample)"),
            ("label", pa.string(), "class, where the set is labelled"),
            ("cluster", pa.int32(), "cluster of the query"),
            (
                "probes",
                pa.list_(pa.int32()),
                "clusters that are searched for it, the nearest first (mode sample); null: all of them",
            ),
        ),
    ),
    Table(
        name="cluster_sizes",
        root="run",
        kind="output",
        parts="task",
        row="one cluster that some shards of the pool hold pictures of; part = group of shards",
        schema=columns(
            ("cluster", pa.int32(), "number"),
            ("num_pictures", pa.int64(), "pictures of these shards in it, after semantic"),
        ),
    ),
    Table(
        name="quotas",
        root="run",
        kind="output",
        parts="task",
        row="one cluster that a set draws from (modes cluster and balanced); part = query set",
        schema=columns(
            ("query_set", pa.string(), "name of the set"),
            ("cluster", pa.int32(), "number"),
            ("num_queries", pa.int64(), "queries of the set in it; null in mode balanced"),
            ("num_asked", pa.int64(), "pictures that the set asks of it"),
            ("num_pictures", pa.int64(), "pictures of the pool in it, after semantic"),
            ("num_taken", pa.int64(), "the lesser of the two, before the cap of the set"),
        ),
    ),
    Table(
        name="candidates",
        root="run",
        kind="output",
        parts="task",
        row="one picture that may be retrieved, of those that some shards of the pool hold; part = (block of a set, "
        "group of shards)",
        schema=columns(
            ("query_id", pa.int64(), "query picture; null in modes cluster and balanced"),
            ID,
            ("order", pa.uint64(), "what decides between equals: first 8 bytes of the sha256, or of the seeded draw"),
            ("similarity", pa.float32(), "cosine to the query; to the centroid in modes cluster and balanced"),
            ("cluster", pa.int32(), "cluster of the picture"),
        ),
    ),
    Table(
        name="neighbours",
        root="run",
        kind="output",
        parts="task",
        row="one picture retrieved for a query, or for a set by its clusters, sorted by image_id; part = first shard "
        "of a block of the set",
        schema=columns(
            ("query_set", pa.string(), "name of the set"),
            ("query_id", pa.int64(), "query picture; null in modes cluster and balanced"),
            ("query_label", pa.string(), "class of that query, where its set is labelled"),
            ID,
            ("rank", pa.int32(), "from 0, within the query or the cluster; -1 where the cap of the set cut it"),
            ("similarity", pa.float32(), "cosine to the query; to the centroid in modes cluster and balanced"),
            ("cluster", pa.int32(), "cluster of the picture"),
        ),
        row_group_rows=4096,  # offers reads it by ranges of image_id
    ),
    Table(
        name="retrieval",
        root="run",
        kind="output",
        parts="task",
        row="one query set: what it asked for and what it got; part = query set",
        schema=columns(
            ("query_set", pa.string(), "name of the set"),
            ("place", pa.int32(), "of the set in the recipe, from 0"),
            ("mode", pa.string(), "as_is | sample | cluster | balanced"),
            ("num_queries", pa.int64(), "pictures of the set that could be read; null in mode balanced"),
            ("num_clusters", pa.int64(), "clusters that it draws from; null in modes as_is and sample"),
            ("num_nominal", pa.int64(), "pictures asked for, as often as they are asked for; null in mode as_is"),
            ("num_final_nominal", pa.int64(), "those that the cap of the set would leave; its own in mode as_is"),
            ("num_retrieved", pa.int64(), "pictures that the pool gave, as often as they were asked for"),
            ("num_taken", pa.int64(), "those that the cap left"),
            ("num_unique", pa.int64(), "different ones of these"),
            ("num_collisions", pa.int64(), "num_taken - num_unique"),
            ("shortfall", pa.int64(), "num_nominal - num_retrieved: more was asked for than there is"),
            ("num_short", pa.int64(), "clusters that hold fewer than was asked of them (quotas tells which)"),
            (
                "num_test_matches",
                pa.int64(),
                "pictures of the set that match a benchmark and are left out; null but in as_is",
            ),
            (
                "num_sampled",
                pa.int64(),
                "queries whose neighbours were also searched in all clusters; null but in sample",
            ),
            ("recall", pa.float32(), "share of the neighbours of these that the search found"),
        ),
    ),
    Table(
        name="offers",
        root="run",
        kind="output",
        parts="group",
        row="one row of neighbours; sorted by image_id, and of one picture by who takes it first: rows that no cap "
        "cut, the order of the recipe, least rank, highest similarity, least query_id",
        schema=columns(
            ID,
            ("query_set", pa.string(), "set that asks for it"),
            ("query_id", pa.int64(), "query that asks for it; null in modes cluster and balanced"),
            ("query_label", pa.string(), "class of that query, where its set is labelled"),
            ("rank", pa.int32(), "from 0, within the query or the cluster; -1 where the cap of the set cut it"),
            ("similarity", pa.float32(), "cosine to the query; to the centroid in modes cluster and balanced"),
        ),
    ),
    Table(
        name="selection",
        root="run",
        kind="verdict",
        row="one pool picture that survived semantic (reason not_retrieved or over_cap), or one of a query set: of "
        "an as-is set what matches no benchmark (reason test_match) is kept, others are not_retrieved",
        schema=columns(
            *VERDICT,
            (
                "part",
                pa.string(),
                "query set that chose it first, in recipe order; the set itself for an as-is set; null where dropped",
            ),
            ("query_id", pa.int64(), "query that chose it; null in modes cluster and as_is"),
            ("similarity", pa.float32(), "to that query or centroid"),
            ("cluster", pa.int32(), "its cluster"),
            ("reference_id", pa.int64(), "benchmark picture that a picture of an as-is set matches; null elsewhere"),
        ),
    ),
    Table(
        name="choices",
        root="run",
        kind="output",
        row="one sample of the set: a chosen picture and whom it was chosen for; of one picture only the first, but "
        "with select.multiset one for each time that it was taken",
        schema=columns(
            ID,
            ("copy", pa.int32(), "number among the samples of this picture, from 0; 0 is the one that selection tells"),
            SHA,
            ("part", pa.string(), "query set that chose it"),
            ("query_id", pa.int64(), "query that chose it; null in modes cluster, balanced and as_is"),
            ("query_label", pa.string(), "class of that query, where its set is labelled"),
            ("similarity", pa.float32(), "to that query or centroid"),
            ("cluster", pa.int32(), "its cluster"),
        ),
    ),
)
