"""Tables of copies: hashes, descriptors, edges, components, and what matches a benchmark."""

import pyarrow as pa

from curation.schema.table import ID, SHA, VERDICT, Table, columns, vector_schema

_VERIFIED = ("verified", pa.bool_(), "local features of the two agree; null where they were not compared")
TABLES = (
    Table(
        name="fit_pca_hash",
        root="pool",
        kind="output",
        parts="single",
        row="one named array of the fitted PCA hash; none where near.hash is another hash",
        schema=columns(
            ("name", pa.string(), "array"),
            ("shape", pa.list_(pa.int32()), "its shape"),
            ("data", pa.list_(pa.float32()), "row-major"),
        ),
    ),
    Table(
        name="pca_hashes",
        root="pool",
        kind="facts",
        row="one safe picture; none where near.hash is another hash",
        schema=columns(
            ID,
            SHA,
            ("pca_hash", pa.uint64(), "by the fit of its folder, first axis most significant; null where one colour"),
        ),
    ),
    Table(
        name="near_codes",
        root="run",
        kind="output",
        parts="group",
        row="one picture that is to be compared in one key range, sorted by range and image_id; part = group of shards",
        schema=columns(
            ("range", pa.int32(), "key range: a part of near_pairs"),
            ("code", pa.uint64(), "its hash"),
            ID,
        ),
        row_group_rows=16_384,  # a task reads one range of each part
    ),
    Table(
        name="near_pairs",
        root="run",
        kind="output",
        parts="task",
        row="one pair of pictures with hashes within the radius, a < b, sorted; part = key range",
        schema=columns(
            ("a", pa.int64(), "image_id"),
            ("b", pa.int64(), "image_id"),
            ("distance_bits", pa.int16(), "Hamming distance of their hashes"),
        ),
    ),
    Table(
        name="near_report",
        root="run",
        kind="output",
        parts="task",
        row="one key by which hashes are compared, and what became of it in one key range; part = key range",
        schema=columns(
            ("key", pa.int32(), "number; a pair belongs to the first one on whose bits its hashes agree"),
            ("num_codes", pa.int64(), "different hashes"),
            ("num_buckets", pa.int64(), "different values of the bits of the key among them"),
            ("largest_bucket", pa.int64(), "most hashes with one value"),
            ("num_rerouted", pa.int64(), "hashes in buckets above `near.max_bucket`, which were cut by other bits"),
            ("num_pairs", pa.int64(), "pairs of different hashes within the radius that belong to the key"),
        ),
    ),
    Table(
        name="near_groups",
        root="run",
        kind="output",
        parts="single",
        row="one picture that is in a group of two or more, sorted by image_id",
        schema=columns(
            ID,
            ("representative_id", pa.int64(), "the picture kept for the group"),
            ("exact", pa.bool_(), "its bytes equal the representative's"),
            ("distance_bits", pa.int16(), "Hamming distance of its hash to the representative's"),
        ),
        row_group_rows=4096,  # near reads it by ranges of image_id
    ),
    Table(
        name="near",
        root="run",
        kind="verdict",
        row="one safe picture",
        schema=columns(
            *VERDICT, ("representative_id", pa.int64(), "the picture kept for its group; itself where alone")
        ),
    ),
    Table(
        name="fit_descriptor",
        root="pool",
        kind="output",
        parts="single",
        row="one named array of the fitted copy descriptor",
        schema=columns(
            ("name", pa.string(), "array"),
            ("shape", pa.list_(pa.int32()), "its shape"),
            ("data", pa.list_(pa.float32()), "row-major"),
        ),
    ),
    Table(
        name="descriptors",
        root="pool",
        kind="facts",
        row="one picture; unit vector for copy detection",
        schema=vector_schema(0),
    ),
    Table(
        name="fit_quantiser",
        root="pool",
        kind="output",
        parts="single",
        row="one centroid of the coarse quantiser over descriptors",
        schema=columns(("centroid", pa.int32(), "number"), ("vector", pa.list_(pa.float32()), "unit length")),
    ),
    Table(
        name="edge_vectors",
        root="run",
        kind="output",
        parts="task",
        row="one picture of some shards in one list that it looks into, sorted by list; gone when edges and "
        "reference_edges stand",
        schema=columns(
            ("list", pa.int32(), "number of the list"),
            ID,
            (
                "probes",
                pa.list_(pa.int32()),
                "all lists that it looks into, home first; of visitors the home alone",
            ),
            ("vector", pa.list_(pa.float16()), "its descriptor"),
        ),
        row_group_rows=1024,  # it is read by lists
    ),
    Table(
        name="edge_keypoints",
        root="run",
        kind="output",
        parts="task",
        row="one picture whose pairs are to be verified; gone when edges and reference_edges stand; part = shard",
        schema=columns(
            ID,
            ("width_px", pa.int32(), "of the picture with its long side at 288 px"),
            ("places", pa.binary(), "x and y of each keypoint in px, float32 [N, 2]"),
            ("sift", pa.binary(), "SIFT of each keypoint, uint8 [N, 128]"),
        ),
        row_group_rows=512,  # it is read by ranges of image_id
    ),
    Table(
        name="edge_proposals",
        root="run",
        kind="output",
        parts="task",
        row="one pair that is to be verified, a < b; part = inverted list that met it; gone when edges stand",
        schema=columns(
            ("list", pa.int32(), "at which `a` is at home"),
            ("a", pa.int64(), "image_id"),
            ("b", pa.int64(), "image_id"),
            ("similarity", pa.float32(), "cosine, exact fp32"),
        ),
        row_group_rows=4096,  # it is read by lists
    ),
    Table(
        name="edges",
        root="run",
        kind="output",
        parts="task",
        row="one pair of pool pictures from `edges.floor` on, and below it where local features agree, a < b; "
        "part = inverted list",
        schema=columns(
            ("a", pa.int64(), "image_id"),
            ("b", pa.int64(), "image_id"),
            ("similarity", pa.float32(), "cosine, exact fp32"),
            _VERIFIED,
        ),
    ),
    Table(
        name="recall_sample",
        root="run",
        kind="output",
        parts="task",
        row="one picture of the sample whose edges are searched exactly, of those that some shards of the pool could "
        "give, sorted by image_id; part = group of shards; gone when recall_pairs stands",
        schema=columns(
            ID,
            ("order", pa.uint64(), "place in the seeded draw"),
            ("vector", pa.list_(pa.float16()), "its descriptor"),
        ),
    ),
    Table(
        name="recall_pairs",
        root="run",
        kind="output",
        parts="task",
        row="one sampled picture and one of some shards that an exact search finds to be its copy, sorted; part = "
        "group of shards",
        schema=columns(
            ("image_id", pa.int64(), "picture of the sample"),
            ("other_id", pa.int64(), "picture of the pool or of a benchmark"),
            ("similarity", pa.float32(), "cosine, exact fp32"),
            ("is_reference", pa.bool_(), "the other one is of a benchmark"),
        ),
    ),
    Table(
        name="edge_recall",
        root="run",
        kind="output",
        parts="single",
        row="what sampled pictures were held against: pool, and benchmark where there is one",
        schema=columns(
            ("kind", pa.string(), "pool | benchmark"),
            ("threshold", pa.float32(), "cosine from which on a pair counts: that of duplicates, that of leakage"),
            ("num_pictures", pa.int64(), "of the pool that near kept"),
            ("num_sampled", pa.int64(), "those that were searched exactly"),
            ("num_edges", pa.int64(), "pairs that the exact search found"),
            ("num_found", pa.int64(), "those that edges, or reference_edges, hold"),
            ("recall", pa.float32(), "num_found / num_edges; null where there is none"),
            (
                "recall_at_least",
                pa.float32(),
                "95 % lower bound (Wilson, one-sided, pairs taken as independent); the recall where all were searched",
            ),
        ),
    ),
    Table(
        name="components",
        root="run",
        kind="output",
        parts="single",
        row="one picture that is in a component of two or more",
        schema=columns(
            ID,
            ("component_id", pa.int64(), "least image_id of the component"),
            ("representative_id", pa.int64(), "the picture kept for the component"),
            ("similarity", pa.float32(), "highest similarity of an edge of this picture"),
        ),
        row_group_rows=16_384,  # duplicates reads it by ranges of image_id
    ),
    Table(
        name="component_sizes",
        root="run",
        kind="output",
        parts="single",
        row="one size of a component, at the threshold in use; size 1: pictures that are in no edge",
        schema=columns(
            ("size", pa.int64(), "pictures in a component"),
            ("num_components", pa.int64(), "components of this size"),
        ),
    ),
    Table(
        name="component_sweep",
        root="run",
        kind="output",
        parts="single",
        row="one threshold: `edges.floor`, the hundredths above it up to 1, and the one in use; an edge counts from "
        "its similarity down, and not at all where local features were compared and do not agree",
        schema=columns(
            ("threshold", pa.float32(), "cosine from which on two pictures are copies"),
            ("in_use", pa.bool_(), "it is `duplicates.threshold`"),
            ("num_edges", pa.int64(), "edges that count"),
            ("num_components", pa.int64(), "components of two or more"),
            ("num_pictures", pa.int64(), "pictures in them"),
            ("num_dropped", pa.int64(), "those that policy component would drop: all but one of each component"),
            ("largest", pa.int64(), "pictures in the largest component; 0 where there is none"),
        ),
    ),
    Table(
        name="duplicates",
        root="run",
        kind="verdict",
        row="one picture that survived near",
        schema=columns(
            *VERDICT,
            ("component_id", pa.int64(), "least image_id of its component"),
            ("representative_id", pa.int64(), "the picture kept for its component"),
        ),
    ),
    Table(
        name="reference_edges",
        root="run",
        kind="output",
        parts="task",
        row="one pair of a picture (of the pool, or of a set that is taken as it is) and a benchmark picture, from "
        "`edges.reference_floor` on, and below it where local features agree; part = inverted list",
        schema=columns(
            ("image_id", pa.int64(), "picture of the pool or of an as-is set"),
            ("reference_id", pa.int64(), "benchmark picture"),
            ("similarity", pa.float32(), "cosine, exact fp32"),
            _VERIFIED,
        ),
    ),
    Table(
        name="touches",
        root="run",
        kind="output",
        parts="group",
        roles=("pool", "query"),
        row="one picture with an edge to a benchmark picture: the edge that says most, sorted by image_id",
        schema=columns(
            ID,
            ("component_id", pa.int64(), "least image_id of its component; itself where it is in none"),
            ("reference_id", pa.int64(), "benchmark picture at the other end"),
            ("similarity", pa.float32(), "of the edge"),
            ("leaks", pa.bool_(), "the two are copies; such an edge comes before all others, then the highest"),
        ),
    ),
    Table(
        name="leaks",
        root="run",
        kind="output",
        parts="group",
        roles=("pool", "query"),
        row="one picture that a benchmark touches, itself or (leakage.mode=component) through its component, sorted by "
        "image_id",
        schema=columns(
            ID,
            ("reference_id", pa.int64(), "benchmark picture that decides"),
            ("via_id", pa.int64(), "picture of its component that has the edge to it; itself where it has one"),
            ("similarity", pa.float32(), "of that edge"),
            ("leaks", pa.bool_(), "the edge joins copies"),
        ),
        row_group_rows=4096,  # leakage reads it by ranges of image_id
    ),
    Table(
        name="leakage",
        root="run",
        kind="verdict",
        row="one picture that survived duplicates",
        schema=columns(
            *VERDICT,
            ("reference_id", pa.int64(), "benchmark picture that decides, see leaks; null where none"),
            ("benchmark", pa.string(), "its set"),
        ),
    ),
)
