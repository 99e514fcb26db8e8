"""Groups of nearly equal pictures, and which picture stands for a group.

A chain of small steps joins pictures that are not alike, so near-duplicates are grouped as stars: pictures are taken in
the order of representatives, each one not yet taken becomes a centre and takes what lies within the radius of itself.
Components and stars depend on the set of pairs only, never on the order of parts, shards or workers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.dedup.near import NearConfig, blocked_distance, parse_hashes, rows_at
from curation.dedup.near_codes import codes_of
from curation.dedup.representatives import ranks_of, representatives, stars
from curation.dedup.unionfind import Numbers, connected_components
from curation.schema import TABLES, id_range
from curation.stage import Context, GlobalStage, Map, ShardStage, Task, TaskIO, verdict_table

# --- pure functions -------------------------------------------------------------------------------------------------


def near_groups(
    a: np.ndarray, b: np.ndarray, distance: np.ndarray, *, rank: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Representative of each node and the distance to it, from the pairs that ``near_pairs`` finds.

    Nodes with equal codes are one node of the star graph, as the chain of zero distances says.

    Args:
        a: node, int64 or uint32 [E].
        b: node, of the same kind [E].
        distance: bits, whole numbers [E].
        rank: rank as representative, int64 [N].

    Returns:
        Node number of the representative, int64 [N], and distance_bits, int16 [N].
    """
    zero = distance == 0
    code = connected_components(len(rank), a[zero], b[zero])
    best = representatives(code, rank).astype(a.dtype)  # the picture that stands for its code
    left, right, bits = best[a[~zero]], best[b[~zero]], distance[~zero]
    centre = stars(rank, left, right)
    to_centre = np.zeros(len(rank), np.int16)
    for member, other in ((left, right), (right, left)):
        taken = centre[member] == other
        to_centre[member[taken]] = bits[taken]
    return centre[best], to_centre[best]


# --- stages ---------------------------------------------------------------------------------------------------------


def group_near_pairs(io: TaskIO, *, shards: list[int], shard_rows: int, num_parts: int) -> pa.Table:
    """The table ``near_groups`` from all parts of ``near_pairs``, read one at a time, and twice.

    Memory: 9 bytes a pair and 8 a picture that is in one are held, and 0.2 for each row of the pool. Beside them
    ranking takes about 130 a picture, and components and stars about 50 a pair.
    """
    parts = [io.part("near_pairs", index) for index in range(num_parts)]
    numbers, num_pairs = Numbers(shards, shard_rows), 0
    for part in parts:
        pairs = io.read(part, ["a", "b"])
        num_pairs += pairs.num_rows
        for name in ("a", "b"):
            numbers.see(pairs[name].to_numpy())
    numbers.close()
    ids = numbers.ids()
    a, b, distance = np.empty(num_pairs, np.uint32), np.empty(num_pairs, np.uint32), np.empty(num_pairs, np.uint8)
    end = 0
    for part in parts:
        pairs = io.read(part)
        start, end = end, end + pairs.num_rows
        a[start:end], b[start:end] = numbers.of(pairs["a"].to_numpy()), numbers.of(pairs["b"].to_numpy())
        distance[start:end] = pairs["distance_bits"].to_numpy()
    rank, sha256 = ranks_of(io, ids, shards)
    centre, bits = near_groups(a, b, distance, rank=rank)
    exact = sha256[centre] == sha256
    size = np.bincount(centre, minlength=len(ids))[centre]
    keep = size > 1  # a picture whose neighbours all went to other centres is alone
    columns = [ids[keep], ids[centre][keep], exact[keep], bits[keep]]
    return pa.table([pa.array(column) for column in columns], schema=TABLES["near_groups"].schema)


class NearGroups(GlobalStage):
    """Stars over the near pairs: who stands for whom."""

    name = "near_groups"
    section = "near"
    reads = ("near_pairs", "safety", "hashes", "images")
    writes = ("near_groups",)
    config: NearConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """All but the cap, which is for ``near_pairs``."""
        return self.config.values_but_the_cap()

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One task over all pairs."""
        shards = context.shards("pool")
        rows = [row["shard_rows"] for row in context.sources().to_pylist() if row["role"] == "pool"]
        num_parts = self.config.key_ranges
        reads = tuple(context.part("near_pairs", index) for index in range(num_parts)) + tuple(
            context.part(table, shard) for table in ("safety", "hashes", "images") for shard in shards
        )
        map(
            [
                Task(
                    function=group_near_pairs,
                    args={"shards": shards, "shard_rows": max(rows, default=1), "num_parts": num_parts},
                    reads=reads,
                    writes=context.part("near_groups", 0),
                )
            ]
        )


class Near(ShardStage):
    """Drops what repeats another picture: exact_duplicate, near_duplicate, and what a blocked hash names."""

    name = "near"
    section = "near"
    kind = "verdict"
    after = "safety"
    reads: ClassVar[tuple[str, ...]] = ("safety", "hashes", "near_groups")
    writes = ("near",)
    config: NearConfig

    def fingerprint_values(self) -> dict[str, Any]:
        """All but the cap, which is for ``near_pairs``."""
        return self.config.values_but_the_cap()

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One row for each picture that safety kept."""
        ids = io.rows["image_id"].to_numpy()
        radius = self.config.radius_bits
        reason = np.full(len(ids), None, object)
        score = np.full(len(ids), np.nan, np.float32)
        representative = ids.copy()

        groups = io.read(io.part("near_groups", 0), within=("image_id", *id_range(shard, shard)))
        group_ids = groups["image_id"].to_numpy()
        mine = np.flatnonzero(np.isin(group_ids, ids))
        place = rows_at(ids, group_ids[mine])
        representative[place] = groups["representative_id"].to_numpy()[mine]
        exact = groups["exact"].to_numpy(zero_copy_only=False)[mine]
        dropped = representative[place] != ids[place]
        reason[place[dropped]] = np.where(exact[dropped], "exact_duplicate", "near_duplicate")
        score[place] = np.where(dropped, groups["distance_bits"].to_numpy()[mine], np.nan)

        codes, code_ids = codes_of(io, shard)
        distance = blocked_distance(codes, parse_hashes(self.config.blocked_hashes))
        hit = np.flatnonzero((distance <= radius) & np.isin(code_ids, ids))
        place = rows_at(ids, code_ids[hit])
        reason[place], score[place] = "blocked_hash", distance[hit]
        representative[place] = ids[place]

        threshold = np.where(np.isnan(score), np.nan, np.float32(radius))
        return {
            "near": verdict_table(
                "near",
                io.rows,
                reason=list(reason),
                score=score,
                threshold=threshold.astype(np.float32),
                representative_id=representative,
            )
        }
