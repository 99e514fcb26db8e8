"""Scored edges between copies: pool against pool, and pool against benchmarks. Searched once, thresholded later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.describe import vectors_of
from curation.dedup.geometric import MIN_PLACES
from curation.dedup.join import Members, assign, fit_centroids, join_list, join_references, nearest_in_list
from curation.dedup.near import rows_at
from curation.dedup.verification import keypoints_of_shard, verify
from curation.schema import SHARDS_PER_SOURCE_LIMIT, TABLES, Part
from curation.stage import Context, GlobalStage, Map, Task, TaskIO, keyed_folder
from training.config import EXECUTION, Config, ConfigError

FLOOR_BELOW_THRESHOLD = 0.05
MIN_PICTURES_PER_LIST = 39  # what Faiss asks for, or its centroids are pictures rather than means
FEW_LISTS = 64  # so few are good enough whatever the sample
VERIFICATION = ("verify_nearest", "verify_floor", "min_places")  # settings that nothing asks for without it
UNDER_WAY_HERE = ("edge_vectors", "edge_keypoints", "edge_proposals")
_PIECE_ROWS = 1 << 18  # rows of a part of edge_vectors: 540 MB where a vector has 1,024 numbers


class EdgesConfig(Config):
    """How edges are searched, and from which cosine on they are stored."""

    floor: float | None = Field(None, gt=-1, lt=1)  # None = 0.05 below the descriptor's duplicate threshold
    reference_floor: float | None = Field(None, gt=-1, lt=1)  # None = 0.05 below its leakage threshold
    num_lists: int = Field(
        16, ge=1, le=65_536
    )  # 16 up to 50,000 pictures; about one for 3,000 above. One list = one task
    # Of 16 lists, 8 and 12 find all 117 pairs of `smoke` at the threshold, 4 find 114 (edges.recall_sample=5000).
    probes: int = Field(12, ge=1)  # lists that a pool picture probes
    reference_probes: int = Field(16, ge=1)  # lists that a benchmark picture probes; they are few, so all of 16
    fit_pictures: int = Field(20_000, ge=1)  # sample of the quantiser
    fit_shards: int = Field(64, ge=1)
    fit_seed: int = 0  # and of the sample below
    recall_sample: int = Field(
        1000, ge=0, json_schema_extra=EXECUTION, description="pictures that are searched exactly, to tell the recall"
    )
    verify: Literal["none", "sift"] = Field(
        "none", description="sift: local features of two pictures decide whether they are copies, not their cosine"
    )
    # Of the edits of `make bench NAME=copies`, 64 find 94.7 %, and the cosine alone 90 %.
    verify_nearest: int = Field(
        64, ge=0, description="so many of a picture's nearest are verified, too, below the floor"
    )
    verify_floor: float = Field(0.1, gt=-1, lt=1, description="cosine that these have at least")
    min_places: int = Field(MIN_PLACES, ge=4, description="that agree in two copies")

    @model_validator(mode="after")
    def _enough_pictures(self) -> EdgesConfig:
        least = MIN_PICTURES_PER_LIST * self.num_lists
        if self.num_lists > FEW_LISTS and self.fit_pictures < least:
            raise ValueError(
                f"edges.fit_pictures: got {self.fit_pictures}, allowed with edges.num_lists={self.num_lists}: {least} "
                f"({MIN_PICTURES_PER_LIST} a list) and above; raise edges.fit_pictures or lower edges.num_lists"
            )
        return self

    def floors(self, descriptor: DescriptorConfig) -> tuple[float, float]:
        """Cosines from which edges and reference edges are stored.

        Raises:
            ConfigError: the descriptor has no thresholds.
        """
        thresholds = descriptor.thresholds()
        floor = thresholds.duplicate - FLOOR_BELOW_THRESHOLD if self.floor is None else self.floor
        below = thresholds.leakage - FLOOR_BELOW_THRESHOLD
        return round(floor, 6), round(below if self.reference_floor is None else self.reference_floor, 6)


def checked_threshold(key: str, value: float, floor: float, floor_key: str) -> float:
    """A threshold that the stored edges can answer.

    Raises:
        ConfigError: edges below the threshold were not stored.
    """
    if value < floor:
        raise ConfigError(
            f"{key}: got {value}, allowed: {floor} (edges.{floor_key}) and above; "
            f"set edges.{floor_key}={value} to search again"
        )
    return value


def is_copy(edges: pa.Table, threshold: float) -> np.ndarray:
    """Which pairs of ``edges`` or ``reference_edges`` are copies, bool [E].

    Where local features were compared, they decide; elsewhere the similarity does, from the threshold on.
    """
    verified = edges["verified"]
    high = edges["similarity"].to_numpy() >= np.float32(threshold)
    agree = verified.fill_null(False).to_numpy()
    return np.asarray(np.where(verified.is_null().to_numpy(), high, agree), bool)


def _not_verified(columns: tuple[np.ndarray, ...], table: str) -> pa.Table:
    """Rows of ``edges`` or ``reference_edges`` whose pictures were not compared."""
    return pa.table([*columns, pa.nulls(len(columns[0]), pa.bool_())], schema=TABLES[table].schema)


# --- tasks ----------------------------------------------------------------------------------------------------------


def fit_quantiser(io: TaskIO, *, shards: list[int], num_pictures: int, num_lists: int, seed: int) -> pa.Table:
    """The table ``fit_quantiser`` from the vectors with the least sha256 in some shards."""
    names, vectors = np.empty(0, "U64"), np.empty((0, 0), np.float32)
    for shard in shards:
        table = io.read(io.part("descriptors", shard))
        names = np.concatenate([names, np.array(table["sha256"].to_pylist(), "U64")])
        vectors = np.concatenate([vectors, vectors_of(table)]) if len(vectors) else vectors_of(table)
        names, first = np.unique(names, return_index=True)
        names, vectors = names[:num_pictures], vectors[first[:num_pictures]]
    centroids = fit_centroids(vectors, num_lists, seed)
    rows = [{"centroid": number, "vector": vector} for number, vector in enumerate(centroids)]
    return pa.Table.from_pylist(rows, schema=TABLES["fit_quantiser"].schema)


def centroids_of(table: pa.Table) -> np.ndarray:
    """Centroids of ``fit_quantiser``, float32 [L, D]."""
    return np.array(table["vector"].to_pylist(), np.float32)


def vectors_by_list(io: TaskIO, *, shards: list[int], cut: list[int], probes: int) -> pa.Table:
    """One part of ``edge_vectors``: pictures of some shards, once for each list that they look into, sorted by list.

    Holds the fp16 vectors of its rows twice.

    Args:
        io: of the task.
        shards: of one role.
        cut: number of this cut of their pictures, and how many there are.
        probes: lists that a picture looks into.
    """
    centroids = centroids_of(io.read(io.part("fit_quantiser", 0)))
    columns: list[list[np.ndarray]] = [[], [], []]
    for shard in shards:
        ids = io.kept("near", shard)["image_id"].to_numpy()
        ids = ids[len(ids) * cut[0] // cut[1] : len(ids) * (cut[0] + 1) // cut[1]]
        table = io.read(io.part("descriptors", shard), ["image_id", "vector"])
        vectors = vectors_of(table)[rows_at(table["image_id"].to_numpy(), ids)]
        found = (ids, vectors.astype(np.float16), assign(vectors, centroids, probes))
        for column, values in zip(columns, found, strict=True):
            column.append(values)
    ids, vectors, seen = (np.concatenate(column) for column in columns)
    num_probes = seen.shape[1]
    lists, row = seen.ravel(), np.repeat(np.arange(len(ids), dtype=np.int32), num_probes)
    order = np.argsort(lists, kind="stable")
    lists, row = lists[order], row[order]
    at_home = seen[row, 0] == lists
    # Only pictures at home are asked where else they look.
    told = np.where(at_home, num_probes, 1)
    ends = np.concatenate([[0], np.cumsum(told)]).astype(np.int32)
    flat = seen[row][np.arange(num_probes) < told[:, None]]
    dims = np.arange(len(row) + 1, dtype=np.int32) * np.int32(vectors.shape[1])
    return pa.table(
        [
            pa.array(lists),
            pa.array(ids[row]),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(flat)),
            pa.ListArray.from_arrays(pa.array(dims), pa.array(vectors[row].ravel())),
        ],
        schema=TABLES["edge_vectors"].schema,
    )


def members_of_list(io: TaskIO, *, pieces: list[int], list_number: int) -> Members:
    """Pictures of some parts of ``edge_vectors`` that are at home in a list or look into it."""
    within = ("list", list_number, list_number + 1)
    tables = [io.read(io.part("edge_vectors", piece), within=within) for piece in pieces]
    rows = pa.concat_tables([TABLES["edge_vectors"].schema.empty_table(), *tables]).combine_chunks()
    if not len(rows):
        nothing = np.empty((0, 0), np.int32)
        return Members(np.empty(0, np.int64), np.empty((0, 0), np.float32), nothing[:, :0].ravel(), nothing)
    seen = pa.concat_arrays(rows["probes"].chunks)
    lengths = seen.value_lengths().to_numpy()
    probes = np.full((len(rows), int(lengths.max())), -1, np.int32)
    probes[np.arange(probes.shape[1]) < lengths[:, None]] = seen.flatten().to_numpy()
    home = probes[:, 0].copy()
    visits = home != list_number
    probes[visits, 0] = list_number  # where else a visitor looks is not known here, and nobody asks
    vectors = pa.concat_arrays(rows["vector"].chunks).flatten().to_numpy(zero_copy_only=False)
    return Members(rows["image_id"].to_numpy(), vectors.reshape(len(rows), -1).astype(np.float32), home, probes)


def edges_of_list(io: TaskIO, *, pieces: list[int], list_number: int, floor: float) -> pa.Table:
    """One part of ``edges`` that nobody verifies."""
    members = members_of_list(io, pieces=pieces, list_number=list_number)
    return _not_verified(join_list(members, list_number, floor, io.device), "edges")


def proposals_of_list(
    io: TaskIO, *, pieces: list[int], list_number: int, floor: float, verify_floor: float, num_nearest: int
) -> pa.Table:
    """One part of ``edge_proposals``: pairs from the floor on, and the nearest of the pictures at home in the list.

    Args:
        io: of the task.
        pieces: parts of ``edge_vectors``.
        list_number: of the list.
        floor: cosine from which on all pairs are proposed.
        verify_floor: cosine that the nearest have at least.
        num_nearest: of each picture.
    """
    members = members_of_list(io, pieces=pieces, list_number=list_number)
    a, b, similarity = join_list(members, list_number, floor, io.device)
    near = nearest_in_list(members, members, list_number, floor=verify_floor, num_nearest=num_nearest)
    low = near.similarity < np.float32(floor)
    left, right = members.ids[near.home[low]], members.ids[near.other[low]]
    a = np.concatenate([a, np.minimum(left, right)])
    b = np.concatenate([b, np.maximum(left, right)])
    similarity = np.concatenate([similarity, near.similarity[low]])
    order = np.argsort(members.ids)
    home = members.home[order[np.searchsorted(members.ids, a, sorter=order)]]
    rows = np.lexsort((b, a, home))
    columns = (home, a, b, similarity)
    return pa.table([pa.array(column[rows]) for column in columns], schema=TABLES["edge_proposals"].schema)


def verified_edges_of_list(
    io: TaskIO, *, parts: list[int], list_number: int, floor: float, min_places: int
) -> pa.Table:
    """One part of ``edges``: the proposals whose lower picture is at home in the list, each verified once.

    Below the floor only copies are stored.
    """
    within = ("list", list_number, list_number + 1)
    tables = [io.read(io.part("edge_proposals", part), within=within) for part in parts]
    rows = pa.concat_tables(tables)
    a, b, similarity = (rows[name].to_numpy() for name in ("a", "b", "similarity"))
    order = np.lexsort((b, a))
    first = (np.diff(a[order], prepend=-1) != 0) | (np.diff(b[order], prepend=-1) != 0)
    order = order[first]
    return _verified(io, (a[order], b[order], similarity[order]), "edges", floor=floor, min_places=min_places)


def _verified(
    io: TaskIO, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], table: str, *, floor: float, min_places: int
) -> pa.Table:
    """Rows of ``edges`` or ``reference_edges`` whose pictures were compared; below the floor only copies."""
    a, b, similarity = pairs
    agree = verify(io, a, b, min_places=min_places)
    kept = (similarity >= np.float32(floor)) | agree.fill_null(False).to_numpy(zero_copy_only=False)
    rows = pa.table([a, b, similarity, agree], schema=TABLES[table].schema)
    return rows.filter(pa.array(kept))


def reference_edges_of_list(
    io: TaskIO,
    *,
    pieces: list[int],
    reference_pieces: list[int],
    list_number: int,
    floor: float,
    verify: dict[str, Any] | None = None,
) -> pa.Table:
    """One part of ``reference_edges``.

    Args:
        io: of the task.
        pieces: parts of ``edge_vectors`` of the pool and of as-is sets.
        reference_pieces: parts of ``edge_vectors`` of benchmarks.
        list_number: of the list.
        floor: cosine from which on pairs are stored.
        verify: verify_floor, num_nearest (benchmark pictures of each picture) and min_places; None: nobody verifies.
    """
    members = members_of_list(io, pieces=pieces, list_number=list_number)
    references = members_of_list(io, pieces=reference_pieces, list_number=list_number)
    if not len(members.ids) or not len(references.ids):
        return TABLES["reference_edges"].schema.empty_table()
    pairs = join_references(members, references, list_number, floor, io.device)
    if verify is None:
        return _not_verified(pairs, "reference_edges")
    near = nearest_in_list(
        members, references, list_number, floor=verify["verify_floor"], num_nearest=verify["num_nearest"]
    )
    low = near.similarity < np.float32(floor)
    more = members.ids[near.home[low]], references.ids[near.other[low]], near.similarity[low]
    ids, reference_ids, similarity = (np.concatenate(columns) for columns in zip(pairs, more, strict=True))
    order = np.lexsort((reference_ids, ids))
    pairs = ids[order], reference_ids[order], similarity[order]
    return _verified(io, pairs, "reference_edges", floor=floor, min_places=verify["min_places"])


# --- stages ---------------------------------------------------------------------------------------------------------


class FitQuantiser(GlobalStage):
    """Coarse quantiser over descriptors of the first shards of the pool; kept when lists are appended."""

    name = "fit_quantiser"
    section = "edges"
    reads = ("descriptors",)
    writes = ("fit_quantiser",)
    config: EdgesConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the fit; floors and probes do not."""
        config = self.config
        return {"fit": [config.num_lists, config.fit_pictures, config.fit_shards, config.fit_seed]}

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_quantiser/kmeans-KEY``: of the descriptors and of the fit."""
        descriptors = context.part("descriptors", 0).folder
        return f"fits/{keyed_folder(table, 'kmeans', self.version, self.fingerprint_values(), descriptors)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit."""
        config = self.config
        shards = context.shards("pool")[: config.fit_shards]
        args = {
            "shards": shards,
            "num_pictures": config.fit_pictures,
            "num_lists": config.num_lists,
            "seed": config.fit_seed,
        }
        reads = tuple(context.part("descriptors", shard) for shard in shards)
        map([Task(function=fit_quantiser, args=args, reads=reads, writes=context.part("fit_quantiser", 0), once=True)])


class Edges(GlobalStage):
    """Pairs of pool pictures, and of pictures and benchmark pictures, at or above the floors; one list = one task.

    Vectors lie by shard and are wanted by list, so they are sorted once into ``edge_vectors``: a vector is written as
    often as its picture probes lists, and read as often, whatever the number of lists. ``as_is`` names the query sets
    whose pictures are held against the benchmarks, too.

    With ``edges.verify`` the lists only propose, and pairs are verified by the list at which their lower picture is at
    home, so that each is looked at once. Keypoints lie in the run meanwhile, 54 kB a picture at most.
    """

    name = "edges"
    section = "edges"
    reads = ("near", "safety", "descriptors", "fit_quantiser", "sources", "detections")
    writes = ("edges", "reference_edges", "edge_vectors", "edge_keypoints", "edge_proposals")
    version = 4
    config: EdgesConfig

    def __init__(self, config: EdgesConfig, descriptor: DescriptorConfig, as_is: Sequence[str] = ()) -> None:
        super().__init__(config)
        self.floor, self.reference_floor = config.floors(descriptor)
        self.as_is = as_is

    def fingerprint_values(self) -> dict[str, Any]:
        """The config with its floors resolved; how pairs are verified only where they are."""
        values = {**super().fingerprint_values(), "floor": self.floor, "reference_floor": self.reference_floor}
        unused = VERIFICATION if self.config.verify == "none" else ()
        return {name: value for name, value in values.items() if name not in unused}

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """Sort by list, then two tasks a list, three with ``edges.verify``; what is under way goes when these stand."""
        sort = self._sorted(context)
        join = self._joined(context, sort)
        under_way = [[task for tasks in sort.values() for task in tasks]]
        if self.config.verify != "none":
            under_way[0] += self._keypoints(context)
            under_way.append(self._proposals(context, sort))
        is_done = all(context.is_done(self, task) for task in join)
        for tasks in under_way * (not is_done):
            map(tasks)
        map(join)
        # Whatever lies there, also of a run that was killed or had other settings: it holds what a takedown removes.
        context.clear(UNDER_WAY_HERE)

    def _sorted(self, context: Context) -> dict[str, list[Task]]:
        """Tasks that sort vectors by list, by role."""
        config = self.config
        roles = {
            "pool": (context.shards("pool"), config.probes),
            "as_is": (self._as_is_shards(context), 1),
            "benchmark": (context.shards("benchmark"), config.reference_probes),
        }
        fit = context.part("fit_quantiser", 0)
        found: dict[str, list[Task]] = {}
        number = 0
        for role, (shards, probes) in roles.items():
            verdict = "near" if role == "pool" else "safety"
            found[role] = []
            for piece, cut in _pieces(context, shards, verdict, probes):
                mine = tuple(context.part(table, shard) for table in (verdict, "descriptors") for shard in piece)
                found[role].append(
                    Task(
                        function=vectors_by_list,
                        args={"shards": piece, "cut": cut, "probes": probes},
                        reads=(fit, *mine),
                        writes=context.part("edge_vectors", number),
                    )
                )
                number += 1
        return found

    def _keypoints(self, context: Context) -> list[Task]:
        """Tasks that find keypoints, one a shard."""
        shards = [*context.shards("pool", "benchmark"), *self._as_is_shards(context)]
        verdicts = dict.fromkeys(context.shards("pool"), "near")
        return [
            Task(
                function=keypoints_of_shard,
                args={"shard": shard},
                reads=(context.part(verdicts.get(shard, "safety"), shard), context.part("detections", shard)),
                writes=context.part("edge_keypoints", shard),
            )
            for shard in shards
        ]

    def _proposals(self, context: Context, sort: dict[str, list[Task]]) -> list[Task]:
        """Tasks that propose pairs of the pool, one a list."""
        config = self.config
        args = {"floor": self.floor, "verify_floor": config.verify_floor, "num_nearest": config.verify_nearest}
        return [
            Task(
                function=proposals_of_list,
                args={**args, "list_number": number, "pieces": _indexes(sort["pool"])},
                reads=_reads(sort["pool"]),
                writes=context.part("edge_proposals", number),
            )
            for number in range(config.num_lists)
        ]

    def _joined(self, context: Context, sort: dict[str, list[Task]]) -> list[Task]:
        """Tasks that write edges, two a list. What is under way goes, so they name what it was made from."""
        config = self.config
        pool = _indexes(sort["pool"])
        looked_at = [sort["pool"], sort["as_is"], sort["benchmark"]]
        own, all_roles = _reads(sort["pool"]), _reads(*looked_at)
        function: Callable[..., pa.Table] = edges_of_list
        args: dict[str, Any] = {"pieces": pool, "floor": self.floor}
        reference_args: dict[str, Any] = {
            "pieces": pool + _indexes(sort["as_is"]),
            "reference_pieces": _indexes(sort["benchmark"]),
            "floor": self.reference_floor,
        }
        if config.verify != "none":
            nearest = {"verify_floor": config.verify_floor, "num_nearest": config.verify_nearest}
            function = verified_edges_of_list
            args = {"parts": list(range(config.num_lists)), "floor": self.floor, "min_places": config.min_places}
            reference_args["verify"] = {**nearest, "min_places": config.min_places}
            keypoints = self._keypoints(context)
            pool_shards = set(context.shards("pool"))
            own += _reads([task for task in keypoints if task.writes.index in pool_shards])
            all_roles = tuple(dict.fromkeys(all_roles + _reads(keypoints)))
        tasks = []
        for number in range(config.num_lists):
            writes = context.part("edges", number)
            tasks.append(Task(function=function, args={**args, "list_number": number}, reads=own, writes=writes))
            writes = context.part("reference_edges", number)
            args_of_list = {**reference_args, "list_number": number}
            tasks.append(Task(function=reference_edges_of_list, args=args_of_list, reads=all_roles, writes=writes))
        return tasks

    def _as_is_shards(self, context: Context) -> list[int]:
        sources = context.sources()
        ids = zip(sources["source_id"].to_pylist(), sources["name"].to_pylist(), strict=True)
        named = {source for source, name in ids if name in self.as_is}
        return [shard for shard in context.shards("query") if shard // SHARDS_PER_SOURCE_LIMIT in named]


def _indexes(tasks: list[Task]) -> list[int]:
    """Parts that tasks write."""
    return [task.writes.index for task in tasks]


def _reads(*groups: list[Task]) -> tuple[Part, ...]:
    """Parts that tasks read, each once, in order."""
    return tuple(dict.fromkeys(part for tasks in groups for task in tasks for part in task.reads))


def _pieces(
    context: Context, shards: Sequence[int], verdict: str, probes: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Shards in pieces of at most ``_PIECE_ROWS`` rows of ``edge_vectors``; no byte of an edge depends on them.

    A shard that has more is a piece in several cuts: number of the cut, and how many there are.
    """
    piece: list[int] = []
    held = 0
    for shard in shards:
        num = context.num_rows(context.part(verdict, shard)) * probes
        if piece and held + num > _PIECE_ROWS:
            yield piece, [0, 1]
            piece, held = [], 0
        if num > _PIECE_ROWS:
            cuts = -(-num // _PIECE_ROWS)
            yield from (([shard], [cut, cuts]) for cut in range(cuts))
        else:
            piece.append(shard)
            held += num
    if piece:
        yield piece, [0, 1]
