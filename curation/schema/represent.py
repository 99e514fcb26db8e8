"""Tables of embeddings and clusters."""

import pyarrow as pa

from curation.schema.table import ID, VERDICT, Table, columns, vector_schema

_SEMANTIC = (
    ID,
    ("nearest_id", pa.int64(), "of the pictures that come before it in the order of its cluster, the most similar"),
    ("similarity", pa.float32(), "cosine to that one, exact fp32; above 1 - semdedup.eps"),
    ("representative_id", pa.int64(), "the kept picture that the chain of these leads to"),
)
TABLES = (
    Table(
        name="fit_embedder",
        root="pool",
        kind="output",
        parts="single",
        row="one named array of the fitted embedder",
        schema=columns(
            ("name", pa.string(), "array"),
            ("shape", pa.list_(pa.int32()), "its shape"),
            ("data", pa.list_(pa.float32()), "row-major"),
        ),
    ),
    Table(
        name="embeddings",
        root="pool",
        kind="facts",
        row="one picture; unit vector for meaning",
        schema=vector_schema(0),
    ),
    Table(
        name="fit_kmeans",
        root="pool",
        kind="output",
        parts="single",
        row="one centroid",
        schema=columns(("cluster", pa.int32(), "number"), ("vector", pa.list_(pa.float32()), "centroid")),
    ),
    Table(
        name="kmeans_pieces",
        root="run",
        kind="output",
        parts="single",
        row="one picture of the sample of a large fit; gone when it is done",
        schema=columns(("piece", pa.int32(), "number of its piece"), ID),
    ),
    Table(
        name="kmeans_sums",
        root="run",
        kind="output",
        parts="task",
        row="one cluster that a piece of the sample has vectors in; part = (iteration, piece); gone when added up",
        schema=columns(
            ("cluster", pa.int32(), "number; before the first iteration that of the vector within the piece"),
            ("num", pa.int64(), "vectors"),
            ("vector", pa.list_(pa.float64()), "their sum"),
        ),
    ),
    Table(
        name="kmeans_centroids",
        root="run",
        kind="output",
        parts="task",
        row="one centroid of a fit that is under way; part = iterations done; gone when the next is",
        schema=columns(("cluster", pa.int32(), "number"), ("vector", pa.list_(pa.float16()), "about unit length")),
    ),
    Table(
        name="fit_hierarchy",
        root="pool",
        kind="output",
        parts="single",
        row="one cluster of a level; no row where the recipe names no level",
        schema=columns(
            ("level", pa.int32(), "0: the clusters of fit_kmeans; each level clusters the centroids of the one below"),
            ("cluster", pa.int32(), "number within the level"),
            ("parent", pa.int32(), "cluster one level up; null on the highest"),
            ("vector", pa.list_(pa.float32()), "centroid; null on level 0, where fit_kmeans holds it"),
        ),
    ),
    Table(
        name="clusters",
        root="run",
        kind="output",
        row="one pool picture that survived leakage, or one query picture",
        schema=columns(ID, ("cluster", pa.int32(), "nearest centroid"), ("similarity", pa.float32(), "cosine to it")),
    ),
    Table(
        name="semantic_vectors",
        root="run",
        kind="output",
        parts="task",
        row="one picture of some shards of the pool, sorted by cluster; gone when semantic_matches stands",
        schema=columns(
            ("cluster", pa.int32(), "its cluster"),
            ID,
            ("order", pa.uint64(), "first 8 bytes of the sha256, or of the seeded draw"),
            ("similarity", pa.float32(), "cosine to the centroid"),
            ("vector", pa.list_(pa.float16()), "its embedding"),
        ),
        row_group_rows=1024,  # it is read by ranges of clusters
    ),
    Table(
        name="semantic_matches",
        root="run",
        kind="output",
        parts="task",
        row="one picture that is too like another of its cluster, sorted by image_id; part = range of clusters",
        schema=columns(*_SEMANTIC),
        row_group_rows=4096,  # it is gathered by ranges of image_id
    ),
    Table(
        name="semantic_duplicates",
        root="run",
        kind="output",
        parts="group",
        row="one row of semantic_matches, sorted by image_id; no part where semdedup.eps is null",
        schema=columns(*_SEMANTIC),
        row_group_rows=4096,  # semantic reads it by ranges of image_id
    ),
    Table(
        name="semantic",
        root="run",
        kind="verdict",
        row="one picture that survived leakage; all are kept where semdedup.eps is null",
        schema=columns(
            *VERDICT,
            ("nearest_id", pa.int64(), "the picture that it is too like, see semantic_matches; null where kept"),
            ("representative_id", pa.int64(), "the picture kept for it; itself where kept"),
        ),
    ),
)
