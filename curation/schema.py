"""Every table of a pool and of a run: where it lies, what one row is, and its columns.

Identity. ``image_id = shard * 1_000_000 + row`` and ``shard = source_id * 1_000_000 + n``: an id follows from a
source and a position in it, before anything is judged, so no block list, threshold or further list ever moves one.
Part N of a per-image table holds ids of shard N only, so that joins per image never shuffle.

Kinds. ``facts`` depend on sources and models only and never say ``keep``; ``verdict`` tables say ``keep, reason,
score, threshold`` and cover exactly the rows that the verdict before them kept; ``output`` is everything else.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

ROWS_PER_SHARD_LIMIT = 1_000_000
SHARDS_PER_SOURCE_LIMIT = 1_000_000

Root = Literal["pool", "run"]
Kind = Literal["facts", "verdict", "output"]
Role = Literal["pool", "query", "benchmark"]
# Parts of a table: one a shard, exactly one (part 0), one a task of the stage that writes it, or one a group of
# consecutive shards, of the pool unless its table says others, numbered by its first (``part_of_group``).
Parts = Literal["shard", "single", "task", "group"]

# The verdicts in the order in which a row meets them. Each covers the rows kept by the one before it.
VERDICTS = ("screened", "fetched", "safety", "near", "duplicates", "leakage", "semantic", "selection")
# Shards of query sets and benchmarks meet only the verdicts up to this one, and there only broken lines, failed fetches
# and pictures that do not decode are dropped. What a later verdict would keep of them is what this one kept.
LAST_VERDICT_OF_REFERENCES = "safety"


@dataclass(frozen=True, order=True)
class Part:
    """One parquet file of a table: ``<root>/<folder>/part-<index>.parquet``."""

    root: Root
    folder: str
    index: int

    @property
    def path(self) -> str:
        """Path of the part inside its root."""
        return f"{self.folder}/part-{self.index:09d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: its root, its kind, what a row is, and its columns."""

    name: str
    root: Root
    kind: Kind
    row: str
    schema: pa.Schema
    parts: Parts = "shard"
    row_group_rows: int = 65_536  # of a parquet file; a range of rows is read in whole row groups
    roles: tuple[Role, ...] = ("pool",)  # of the shards in the groups of a table with one part a group


def image_ids(shard: int, num_rows: int) -> np.ndarray:
    """Ids of rows 0 to ``num_rows - 1`` of a shard, int64 [num_rows]."""
    return shard * ROWS_PER_SHARD_LIMIT + np.arange(num_rows, dtype=np.int64)


def shard_of(image_id: int) -> int:
    """Shard that holds an image."""
    return int(image_id) // ROWS_PER_SHARD_LIMIT


def id_range(first: int, last: int) -> tuple[int, int]:
    """First id of shard ``first``, and the one behind the ids of shard ``last``."""
    return first * ROWS_PER_SHARD_LIMIT, (last + 1) * ROWS_PER_SHARD_LIMIT


def part_of_group(parts: Sequence[Part], shard: int) -> Part:
    """Of the parts of a table with one part a group, the one whose group holds a shard.

    Args:
        parts: of the table, in order of index.
        shard: of one of the roles of the table.
    """
    return parts[bisect_right([part.index for part in parts], shard) - 1]


def groups_by_size(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """Consecutive shards, given with their rows, that hold at most ``most`` rows together, or are one.

    An appended shard changes the last group only.
    """
    group: list[int] = []
    held = 0
    for shard, num_rows in sizes:
        if group and held + num_rows > most:
            yield group
            group, held = [], 0
        group.append(shard)
        held += num_rows
    if group:
        yield group


def source_of_shard(shard: int) -> int:
    """``source_id`` of the source that a shard belongs to."""
    return int(shard) // SHARDS_PER_SOURCE_LIMIT


def first_shard(source_id: int) -> int:
    """Number of the first shard of a source."""
    return source_id * SHARDS_PER_SOURCE_LIMIT


def _schema(*fields: tuple[str, pa.DataType, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in fields])


_ID = ("image_id", pa.int64(), "shard * 1_000_000 + row")
_SHA = ("sha256", pa.string(), "sha256 of the stored bytes, hex")
_VERDICT = (
    _ID,
    _SHA,
    ("keep", pa.bool_(), "true: the row goes on"),
    ("reason", pa.string(), "why it was dropped; null where kept"),
    ("score", pa.float32(), "the number that was judged; null where none was"),
    ("threshold", pa.float32(), "what it was judged against"),
)
BOX = pa.struct(
    [
        ("label", pa.string()),
        ("score", pa.float32()),
        ("x_px", pa.float32()),
        ("y_px", pa.float32()),
        ("w_px", pa.float32()),
        ("h_px", pa.float32()),
    ]
)
_VERIFIED = ("verified", pa.bool_(), "local features of the two agree; null where they were not compared")
_SEMANTIC = (
    _ID,
    ("nearest_id", pa.int64(), "of the pictures that come before it in the order of its cluster, the most similar"),
    ("similarity", pa.float32(), "cosine to that one, exact fp32; above 1 - semdedup.eps"),
    ("representative_id", pa.int64(), "the kept picture that the chain of these leads to"),
)
_TAR = (
    ("tar", pa.string(), "path inside the run"),
    ("num_samples", pa.int64(), "pictures"),
    ("num_bytes", pa.int64(), "size of the tar"),
    ("sha256", pa.string(), "of the tar"),
)
# What the manifest tells of a sample, before it lies in a tar, and where its bytes lie.
_SAMPLE = (
    ("shuffle_key", pa.int64(), "its place in the shuffle; equal ones go by image_id and copy"),
    _ID,
    ("copy", pa.int32(), "number among the samples of this picture, from 0"),
    ("url", pa.string(), "where it came from; null for local files"),
    ("location", pa.string(), "local file inside its source; null for addresses"),
    ("page_url", pa.string(), "page that shows it"),
    ("alt_text", pa.string(), "text that came with it"),
    ("source", pa.string(), "list, folder or set"),
    ("label", pa.string(), "class, where the source is labelled"),
    _SHA,
    ("width_px", pa.int32(), "after orientation"),
    ("height_px", pa.int32(), "after orientation"),
    ("blurred", pa.bool_(), "faces were blurred"),
    ("part", pa.string(), "query set that chose it"),
    ("query_id", pa.int64(), "query that chose it"),
    ("query_label", pa.string(), "class of that query, where its set is labelled"),
    ("similarity", pa.float32(), "to it"),
    ("cluster", pa.int32(), "its cluster"),
    ("ext", pa.string(), "extension of the picture inside the tar"),
    ("object", pa.string(), "tar of the pool that holds it, its blurred version where there is one"),
    ("object_offset", pa.int64(), "of its first byte there"),
    ("num_bytes", pa.int64(), "its size"),
)


def vector_schema(dim: int) -> pa.Schema:
    """Schema of one descriptor or embedding table: unit vectors, fp16 [dim]."""
    return _schema(_ID, _SHA, ("vector", pa.list_(pa.float16(), dim), "unit length"))


_TABLES = (
    Table(
        name="sources",
        root="pool",
        kind="facts",
        parts="single",
        row="one registered source: list, folder, tar, benchmark, query set",
        schema=_schema(
            ("source_id", pa.int32(), "position of registration; first shard = source_id * 1_000_000"),
            ("name", pa.string(), "name in the recipe"),
            ("role", pa.string(), "pool | query | benchmark"),
            ("kind", pa.string(), "list | pages | archive | folder | tar | parquet"),
            ("location", pa.string(), "path or address as the recipe gives it"),
            ("digest", pa.string(), "sha256 over the rows, in order"),
            ("num_rows", pa.int64(), "rows registered so far"),
            ("shard_rows", pa.int32(), "rows of a full shard"),
            ("num_shards", pa.int32(), "shards registered so far"),
        ),
    ),
    Table(
        name="pages",
        root="pool",
        kind="facts",
        parts="task",
        row="one visit to a page of a source of kind pages, in the order of its crawl",
        schema=_schema(
            ("source", pa.string(), "name of the source"),
            ("page", pa.int64(), "number in the source, from 0; a page that is visited again gets another"),
            ("url", pa.string(), "canonical address; as the source has it where it is none"),
            ("depth", pa.int32(), "links from a page that the source names"),
            ("seed", pa.int64(), "line of the source that led here, from 0"),
            ("parent", pa.int64(), "page whose link led here; null for what the source names"),
            ("reason", pa.string(), "why it was not read; null where it was"),
            ("http_status", pa.int32(), "of the last answer"),
            ("final_url", pa.string(), "where it stands, canonical; null where it was not read"),
            ("content_type", pa.string(), "as the server says"),
            ("robots", pa.string(), "allowed | denied | none | unreachable; null where robots.txt was not asked for"),
            ("opt_out", pa.string(), "header that forbids use"),
            ("directives", pa.list_(pa.string()), "what it says to robots itself: noindex, nofollow, …"),
            ("num_images", pa.int32(), "rows that it gives"),
            ("num_links", pa.int32(), "addresses that it leads to"),
            (
                "images",
                pa.list_(pa.struct([("url", pa.string()), ("alt_text", pa.string()), ("error", pa.string())])),
                "pictures in their order; error: why one cannot be used",
            ),
            ("links", pa.list_(pa.string()), "of those addresses, canonical, the ones that may be followed"),
        ),
    ),
    Table(
        name="urls",
        root="pool",
        kind="facts",
        row="one line of a source, broken ones too",
        schema=_schema(
            _ID,
            ("source", pa.string(), "name of the source"),
            ("line", pa.int64(), "position in the source, from 0"),
            ("file", pa.string(), "file it stands in, below the folder of the source; null in pools of before"),
            ("file_line", pa.int64(), "line, row, member or record of it, from 1; null where the file is the picture"),
            ("url", pa.string(), "address as written; null for local files without one"),
            ("host", pa.string(), "host of the address, lower case"),
            ("location", pa.string(), "local file as `path` or `archive::member`; null for addresses"),
            ("page_url", pa.string(), "page that shows the picture"),
            ("alt_text", pa.string(), "text that came with it"),
            ("label", pa.string(), "class, where the source is labelled"),
            ("error", pa.string(), "why the line cannot be used; null where it can"),
        ),
    ),
    Table(
        name="takedowns",
        root="pool",
        kind="facts",
        parts="single",
        row="one rule of the takedown list; consulted by fetch and look, outside every fingerprint",
        schema=_schema(
            ("kind", pa.string(), "url | sha256 | phash | pdq"),
            ("value", pa.string(), "canonical address, or hex digits in lower case"),
            ("radius_bits", pa.int16(), "of a hash: bits that may differ; null for the others"),
            ("reason", pa.string(), "why, as it was given; `bytes of URL` where it follows from another rule"),
            ("added_at", pa.timestamp("ms", tz="UTC"), "when"),
            ("applied", pa.bool_(), "the pool was purged of what it names"),
        ),
    ),
    Table(
        name="url_keys",
        root="run",
        kind="output",
        row="one line of a source, and what the rules of screening say that look at one line only",
        schema=_schema(
            _ID,
            ("reason", pa.string(), "why it is dropped; null where it passes"),
            (
                "url_key",
                pa.uint64(),
                "first 8 bytes of the sha256 of its canonical address; null where it is dropped or is no address, and "
                "in query sets and benchmarks",
            ),
        ),
    ),
    Table(
        name="url_order",
        root="run",
        kind="output",
        parts="group",
        row="one line with a key, sorted by url_key and image_id; part = group of shards",
        schema=_schema(
            ("bucket", pa.int32(), "first 16 bits of the key"),
            ("url_key", pa.uint64(), "see url_keys"),
            _ID,
        ),
        row_group_rows=8192,  # a task reads one range of each part
    ),
    Table(
        name="url_repeats",
        root="run",
        kind="output",
        parts="task",
        row="the first line of a group of shards with an address that an earlier group has, sorted by image_id; part = "
        "range of url_key",
        schema=_schema(_ID, ("first_id", pa.int64(), "least image_id with this address")),
        row_group_rows=4096,  # it is gathered by ranges of image_id
    ),
    Table(
        name="url_duplicates",
        root="run",
        kind="output",
        parts="group",
        row="one line whose address an earlier line has, sorted by image_id; part = group of shards",
        schema=_schema(_ID, ("first_id", pa.int64(), "least image_id with this address")),
        row_group_rows=4096,  # screened reads it by ranges of image_id
    ),
    Table(
        name="screened",
        root="run",
        kind="verdict",
        row="one line of a source",
        schema=_schema(*_VERDICT),
    ),
    Table(
        name="images",
        root="pool",
        kind="facts",
        row="one fetched line, failures too",
        schema=_schema(
            _ID,
            ("ok", pa.bool_(), "bytes are stored"),
            ("reason", pa.string(), "failure class; null where ok"),
            ("transient", pa.bool_(), "the failure may pass with time"),
            ("http_status", pa.int16(), "last status; null where none came or the file is local"),
            ("final_url", pa.string(), "address after redirects"),
            ("content_type", pa.string(), "as the server said"),
            ("robots", pa.string(), "allowed | denied | none | unreachable; null for local files"),
            ("opt_out", pa.string(), "the header directive that forbade use"),
            ("format", pa.string(), "sniffed from the bytes: jpeg, png, webp, …"),
            _SHA,
            ("num_bytes", pa.int64(), "size of the bytes"),
            ("object", pa.string(), "tar inside the pool; null where nothing was kept, or the original was purged"),
            ("offset", pa.int64(), "of the first byte inside the tar"),
        ),
    ),
    Table(
        name="fetch_log",
        root="pool",
        kind="facts",
        row="one visit to a server; holds times, so it stands outside every digest",
        schema=_schema(
            _ID,
            ("attempt", pa.int16(), "from 1"),
            ("started_at", pa.timestamp("ms", tz="UTC"), "start of the visit"),
            ("elapsed_s", pa.float32(), "until the outcome"),
            ("url", pa.string(), "address of this hop"),
            ("address", pa.string(), "ip:port that was connected to; null where none was"),
            ("http_status", pa.int16(), "status of this hop"),
            ("outcome", pa.string(), "ok, redirect, or a failure class"),
            (
                "headers",
                pa.map_(pa.string(), pa.string()),
                "of the answer, names in lower case: those that decided, and those that tell whether it changed",
            ),
        ),
    ),
    Table(
        name="fetched",
        root="run",
        kind="verdict",
        row="one line that screening let through",
        schema=_schema(*_VERDICT),
    ),
    Table(
        name="hashes",
        root="pool",
        kind="facts",
        row="one picture that was looked at",
        schema=_schema(
            _ID,
            _SHA,
            ("ok", pa.bool_(), "it decoded"),
            ("reason", pa.string(), "decode failure class; null where ok"),
            ("width_px", pa.int32(), "after orientation"),
            ("height_px", pa.int32(), "after orientation"),
            ("format", pa.string(), "as the decoder says"),
            ("num_frames", pa.int32(), "1 for a still picture; the first one is used"),
            ("pixel_sha256", pa.string(), "sha256 of shape and RGB bytes"),
            ("phash", pa.uint64(), "imagehash.phash, most significant bit first"),
            ("dhash", pa.uint64(), "imagehash.dhash, most significant bit first"),
            ("pdq", pa.string(), "PDQ, 64 hex digits, most significant bit first; null where it did not decode"),
            ("pdq_quality", pa.int16(), "of PDQ, 0 to 100; below 50 it is not trusted"),
            ("luma_std", pa.float32(), "standard deviation of luma, 0 to 127; near 0 is a blank picture"),
            (
                "flat_share",
                pa.float32(),
                "largest share of pixels within a grey level of one luma; near 1 is a placeholder",
            ),
        ),
    ),
    Table(
        name="detections",
        root="pool",
        kind="facts",
        row="one picture that was looked at",
        schema=_schema(
            _ID,
            _SHA,
            ("boxes", pa.list_(BOX), "all boxes above the floor, pixels of the oriented picture"),
            (
                "class_scores",
                pa.map_(pa.string(), pa.float32()),
                "largest score of every class of NudeNet, before overlaps are suppressed; empty without NudeNet",
            ),
            ("nsfw_label", pa.string(), "explicit class with the highest of them; null where there are none"),
            ("nsfw_score", pa.float32(), "that score, 0 where there are none"),
            ("faces", pa.list_(BOX), "boxes that were blurred, dilated"),
            ("num_faces", pa.int32(), "length of faces"),
            ("blurred_object", pa.string(), "tar of the blurred version; null where nothing was blurred"),
            ("blurred_offset", pa.int64(), "of its first byte"),
            ("blurred_bytes", pa.int64(), "its size"),
            (
                "small_object",
                pa.string(),
                "tar of the 288-px intermediate (faces blurred); null where it did not decode",
            ),
            ("small_offset", pa.int64(), "of its first byte"),
            ("small_bytes", pa.int64(), "its size"),
        ),
    ),
    Table(
        name="opinions",
        root="pool",
        kind="facts",
        row="one picture that was looked at; none where opinion.name is none",
        schema=_schema(
            _ID,
            _SHA,
            ("score", pa.float32(), "of the head that gives a second opinion; null where it was not asked"),
        ),
    ),
    Table(name="safety", root="run", kind="verdict", row="one fetched picture", schema=_schema(*_VERDICT)),
    Table(
        name="fit_pca_hash",
        root="pool",
        kind="output",
        parts="single",
        row="one named array of the fitted PCA hash; none where near.hash is another hash",
        schema=_schema(
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
        schema=_schema(
            _ID,
            _SHA,
            ("pca_hash", pa.uint64(), "by the fit of its folder, first axis most significant; null where one colour"),
        ),
    ),
    Table(
        name="near_codes",
        root="run",
        kind="output",
        parts="group",
        row="one picture that is to be compared in one key range, sorted by range and image_id; part = group of shards",
        schema=_schema(
            ("range", pa.int32(), "key range: a part of near_pairs"),
            ("code", pa.uint64(), "its hash"),
            _ID,
        ),
        row_group_rows=16_384,  # a task reads one range of each part
    ),
    Table(
        name="near_pairs",
        root="run",
        kind="output",
        parts="task",
        row="one pair of pictures with hashes within the radius, a < b, sorted; part = key range",
        schema=_schema(
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
        schema=_schema(
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
        schema=_schema(
            _ID,
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
        schema=_schema(
            *_VERDICT, ("representative_id", pa.int64(), "the picture kept for its group; itself where alone")
        ),
    ),
    Table(
        name="fit_descriptor",
        root="pool",
        kind="output",
        parts="single",
        row="one named array of the fitted copy descriptor",
        schema=_schema(
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
        schema=_schema(("centroid", pa.int32(), "number"), ("vector", pa.list_(pa.float32()), "unit length")),
    ),
    Table(
        name="edge_vectors",
        root="run",
        kind="output",
        parts="task",
        row="one picture of some shards in one list that it looks into, sorted by list; gone when edges and "
        "reference_edges stand",
        schema=_schema(
            ("list", pa.int32(), "number of the list"),
            _ID,
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
        schema=_schema(
            _ID,
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
        schema=_schema(
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
        schema=_schema(
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
        schema=_schema(
            _ID,
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
        schema=_schema(
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
        schema=_schema(
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
        schema=_schema(
            _ID,
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
        schema=_schema(
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
        schema=_schema(
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
        schema=_schema(
            *_VERDICT,
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
        schema=_schema(
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
        schema=_schema(
            _ID,
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
        schema=_schema(
            _ID,
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
        schema=_schema(
            *_VERDICT,
            ("reference_id", pa.int64(), "benchmark picture that decides, see leaks; null where none"),
            ("benchmark", pa.string(), "its set"),
        ),
    ),
    Table(
        name="fit_embedder",
        root="pool",
        kind="output",
        parts="single",
        row="one named array of the fitted embedder",
        schema=_schema(
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
        schema=_schema(("cluster", pa.int32(), "number"), ("vector", pa.list_(pa.float32()), "centroid")),
    ),
    Table(
        name="kmeans_pieces",
        root="run",
        kind="output",
        parts="single",
        row="one picture of the sample of a large fit; gone when it is done",
        schema=_schema(("piece", pa.int32(), "number of its piece"), _ID),
    ),
    Table(
        name="kmeans_sums",
        root="run",
        kind="output",
        parts="task",
        row="one cluster that a piece of the sample has vectors in; part = (iteration, piece); gone when added up",
        schema=_schema(
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
        schema=_schema(("cluster", pa.int32(), "number"), ("vector", pa.list_(pa.float16()), "about unit length")),
    ),
    Table(
        name="fit_hierarchy",
        root="pool",
        kind="output",
        parts="single",
        row="one cluster of a level; no row where the recipe names no level",
        schema=_schema(
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
        schema=_schema(_ID, ("cluster", pa.int32(), "nearest centroid"), ("similarity", pa.float32(), "cosine to it")),
    ),
    Table(
        name="semantic_vectors",
        root="run",
        kind="output",
        parts="task",
        row="one picture of some shards of the pool, sorted by cluster; gone when semantic_matches stands",
        schema=_schema(
            ("cluster", pa.int32(), "its cluster"),
            _ID,
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
        schema=_schema(*_SEMANTIC),
        row_group_rows=4096,  # it is gathered by ranges of image_id
    ),
    Table(
        name="semantic_duplicates",
        root="run",
        kind="output",
        parts="group",
        row="one row of semantic_matches, sorted by image_id; no part where semdedup.eps is null",
        schema=_schema(*_SEMANTIC),
        row_group_rows=4096,  # semantic reads it by ranges of image_id
    ),
    Table(
        name="semantic",
        root="run",
        kind="verdict",
        row="one picture that survived leakage; all are kept where semdedup.eps is null",
        schema=_schema(
            *_VERDICT,
            ("nearest_id", pa.int64(), "the picture that it is too like, see semantic_matches; null where kept"),
            ("representative_id", pa.int64(), "the picture kept for it; itself where kept"),
        ),
    ),
    Table(
        name="queries",
        root="run",
        kind="output",
        row="one query picture; part = shard of its query set",
        schema=_schema(
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
        schema=_schema(
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
        schema=_schema(
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
        schema=_schema(
            ("query_id", pa.int64(), "query picture; null in modes cluster and balanced"),
            _ID,
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
        schema=_schema(
            ("query_set", pa.string(), "name of the set"),
            ("query_id", pa.int64(), "query picture; null in modes cluster and balanced"),
            ("query_label", pa.string(), "class of that query, where its set is labelled"),
            _ID,
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
        schema=_schema(
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
        schema=_schema(
            _ID,
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
        schema=_schema(
            *_VERDICT,
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
        schema=_schema(
            _ID,
            ("copy", pa.int32(), "number among the samples of this picture, from 0; 0 is the one that selection tells"),
            _SHA,
            ("part", pa.string(), "query set that chose it"),
            ("query_id", pa.int64(), "query that chose it; null in modes cluster, balanced and as_is"),
            ("query_label", pa.string(), "class of that query, where its set is labelled"),
            ("similarity", pa.float32(), "to that query or centroid"),
            ("cluster", pa.int32(), "its cluster"),
        ),
    ),
    Table(
        name="export_rows",
        root="run",
        kind="output",
        parts="task",
        row="one sample of some shards, sorted by its place in the shuffle",
        schema=_schema(*_SAMPLE),
        row_group_rows=1024,  # it is read by small ranges
    ),
    Table(
        name="export_plan",
        root="run",
        kind="output",
        parts="task",
        row="one sample of the set, in the order of the seeded shuffle; part = range of it",
        schema=_schema(("row", pa.int64(), "place in the part, from 0"), *_SAMPLE),
        row_group_rows=1024,
    ),
    Table(
        name="tar_digests",
        root="run",
        kind="output",
        parts="task",
        row="one tar, as it was read back; part = group of 64",
        schema=_schema(*_TAR),
    ),
    Table(
        name="shards",
        root="run",
        kind="output",
        parts="single",
        row="one tar, in order",
        schema=_schema(*_TAR),
    ),
    Table(
        name="manifest",
        root="run",
        kind="output",
        parts="task",
        row="one sample of one tar; part = tar",
        schema=_schema(
            ("key", pa.string(), "sample key inside the tar, sorted"),
            _ID,
            ("url", pa.string(), "where it came from; null for local files"),
            ("location", pa.string(), "local file inside its source; null for addresses"),
            ("page_url", pa.string(), "page that shows it"),
            ("alt_text", pa.string(), "text that came with it"),
            ("source", pa.string(), "list, folder or set"),
            ("label", pa.string(), "class, where the source is labelled"),
            ("sha256", pa.string(), "of the original bytes; where faces were blurred, the bytes in the tar are others"),
            ("width_px", pa.int32(), "after orientation"),
            ("height_px", pa.int32(), "after orientation"),
            ("blurred", pa.bool_(), "faces were blurred"),
            ("part", pa.string(), "query set that chose it"),
            ("query_id", pa.int64(), "query that chose it"),
            ("query_label", pa.string(), "class of that query, where its set is labelled"),
            ("similarity", pa.float32(), "to it"),
            ("cluster", pa.int32(), "its cluster"),
            ("tar", pa.string(), "path inside the run"),
            ("offset", pa.int64(), "of the picture's first byte inside the tar"),
            ("size", pa.int64(), "bytes of the picture as stored in the tar"),
            ("ext", pa.string(), "extension inside the tar"),
        ),
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in _TABLES}
# Their vectors have the length that the model gives; the schema above holds a nominal one.
VECTOR_TABLES = ("descriptors", "embeddings")
# In a run only while a stage is under way. They hold vectors, so they go with a takedown.
UNDER_WAY = (
    "kmeans_pieces",
    "kmeans_sums",
    "kmeans_centroids",
    "semantic_vectors",
    "edge_vectors",
    "edge_keypoints",
    "edge_proposals",
    "recall_sample",
)
# Tables of visits hold times: they are outside every comparison, and do not say which rows are done.
LOGS = ("fetch_log",)


def verdict_before(name: str) -> str | None:
    """The verdict whose kept rows the verdict ``name`` covers; None for the first."""
    place = VERDICTS.index(name)
    return VERDICTS[place - 1] if place else None


def table_of(part: Part) -> str:
    """Table of a part, whose folder is ``TABLE``, ``TABLE/MODEL-KEY`` or ``fits/TABLE/MODEL-KEY``."""
    folders = part.folder.split("/")
    return folders[1] if folders[0] == "fits" else folders[0]
