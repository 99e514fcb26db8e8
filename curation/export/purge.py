"""Purge: what the takedown list names leaves the pool, with its bytes, its blurred version, its thumbnail, its vectors.

The order makes it safe to be killed at any moment, and to be run again: the rules are in the list first, then tars are
written again without the picture, then the parts that name them are swapped, then old tars are deleted, then the rules
are marked as applied. Every step finds what it has to do from the tables, so a second run does what the first did not.

A mended part keeps its origin, so it counts as done; its content is another, so the verdicts that read it follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.dedup.describe import vectors_of
from curation.export.objects import OF_POOL, any_of, parts_of, rewritten, swap, unnamed_objects
from curation.ingest.takedown import PART, TAKEN_DOWN, Rule, Rules, known_rules, merged, to_table
from curation.lease import LeaseLostError
from curation.schema import VECTOR_TABLES, Part
from curation.stage import digest_of
from curation.store import Store, read_part, write_part

# A centroid this near to a picture's vector is that picture: the mean of two different ones is further away.
_SAME_VECTOR = 0.9999
_FITS_OF_VECTORS = ("fit_kmeans", "fit_hierarchy", "fit_quantiser")
# Of a row that was never asked for: no visit, no bytes.
_OF_VISIT = ("http_status", "final_url", "content_type", "robots", "opt_out")
_OF_BYTES = ("format", "sha256", "num_bytes", "object", "offset")


@dataclass(kw_only=True)
class Purged:
    """What a purge did."""

    image_ids: set[int] = field(default_factory=set)  # whose bytes, facts or vectors it removed
    num_parts: int = 0  # written again
    num_fits: int = 0  # removed, to be made again
    num_deleted: int = 0  # objects
    deleted_bytes: int = 0


Check = Callable[[], None]


class _Parts:
    """Parts of the pool by table and shard, listed once; several where several models looked at the same pictures."""

    def __init__(self, pool: Store) -> None:
        self.store = pool
        self._found: dict[str, dict[int, list[Part]]] = {}
        for table in ("urls", "images", "hashes", "detections", "opinions", "pca_hashes", *VECTOR_TABLES):
            by_shard = self._found.setdefault(table, {})
            for part in parts_of(pool, table):
                by_shard.setdefault(part.index, []).append(part)

    @property
    def shards(self) -> list[int]:
        """All shards, of all sources."""
        return sorted(self._found["urls"])

    def of(self, table: str, shard: int) -> list[Part]:
        """Parts of a table for a shard."""
        return self._found[table].get(shard, [])


# Which pictures


def pending(pool: Store) -> bool:
    """Whether the pool may hold something that its list names: a rule is not applied, or look met a hash of it."""
    rules = known_rules(pool)
    if not all(rule.applied for rule in rules):
        return True
    return Rules(rules).has_hashes and any(
        pc.any(pc.equal(read_part(pool, part, ["reason"])["reason"], TAKEN_DOWN)).as_py()
        for part in parts_of(pool, "hashes")
    )


def with_bytes_of(pool: Store, rules: list[Rule]) -> list[Rule]:
    """The rules, and one for the bytes of each stored picture that an address or a hash names.

    So the same bytes under another address are named too, in this pool and in whatever is fetched later.
    """
    held, parts = Rules(rules), _Parts(pool)
    found: dict[str, int] = {}
    for shard in parts.shards:
        for table, named in _named_rows(parts, shard, held):
            rows = table.filter(named)
            for sha256, image_id in zip(rows["sha256"].to_pylist(), rows["image_id"].to_pylist(), strict=True):
                if sha256 is not None:
                    found.setdefault(sha256, image_id)
    new = [
        Rule(kind="sha256", value=sha256, reason=f"bytes of image {image_id}")
        for sha256, image_id in found.items()
        if not held.sha256(sha256)
    ]
    return merged(rules, new)


def pictures_named(pool: Store, rules: list[Rule]) -> set[int]:
    """Ids of stored pictures that the rules name, themselves or by the bytes of another picture."""
    held, parts = Rules(with_bytes_of(pool, rules)), _Parts(pool)
    found: set[int] = set()
    for shard in parts.shards:
        for table, named in _named_rows(parts, shard, held):
            rows = table.filter(any_of(pc.and_(named, pc.is_valid(table["sha256"]))))
            found.update(rows["image_id"].to_pylist())
    return found


def _ids_by_url(parts: _Parts, shard: int, rules: Rules) -> pa.Array:
    """Lines of a shard whose address is named, int64."""
    found: list[int] = []
    for part in parts.of("urls", shard) if rules.hosts else ():
        urls = read_part(parts.store, part, ["image_id", "url", "host"])
        urls = urls.filter(pc.is_in(urls["host"], value_set=pa.array(sorted(rules.hosts))))
        found += [row["image_id"] for row in urls.to_pylist() if rules.url(row["url"])]
    return pa.array(found, pa.int64())


def _named_rows(parts: _Parts, shard: int, rules: Rules) -> Iterator[tuple[pa.Table, pa.Array]]:
    """Rows of ``images`` and of each ``hashes`` of a shard (image_id, sha256, …), and which of them are named."""
    by_url = _ids_by_url(parts, shard, rules)
    for part in parts.of("images", shard):
        table = read_part(parts.store, part, ["image_id", "sha256", "final_url"])
        redirected = pa.array([rules.url(url) for url in table["final_url"].to_pylist()], pa.bool_())
        yield table, any_of(_doomed(table, by_url, rules), redirected)
    for part in parts.of("hashes", shard):
        columns = ["image_id", "sha256", "phash", "reason"]
        table = read_part(parts.store, part, None if rules.has_pdqs else columns)
        codes = pc.fill_null(table["phash"], 0).to_numpy()
        alike = pc.and_(pa.array(rules.phash(codes)), pc.is_valid(table["phash"].combine_chunks()))
        if "pdq" in table.column_names:  # parts of the first version of look have none: named by their bytes
            by_pdq = rules.pdq(table["pdq"].to_pylist(), table["pdq_quality"].to_pylist())
            alike = any_of(alike, pa.array(by_pdq))
        met = pc.equal(table["reason"], TAKEN_DOWN)
        yield table, any_of(_doomed(table, by_url, rules), alike, met)


def _doomed(table: pa.Table, by_url: pa.Array, rules: Rules) -> pa.Array:
    """Rows of a table with image_id and sha256 that go, bool [N]."""
    named = pa.array(sorted(rules.sha256s), pa.string())
    return any_of(pc.is_in(table["image_id"], value_set=by_url), pc.is_in(table["sha256"], value_set=named))


# The list


def put_rules(pool: Store, rules: list[Rule], scratch: Path) -> None:
    """Write the list, in one step."""
    path = scratch / "takedowns.parquet"
    write_part(to_table(rules), path, stage="takedown", version=1, fingerprint=digest_of(["takedown", 1]), inputs={})
    if not pool.replace(PART.path, path, pool.tag(PART.path)):
        raise LeaseLostError(f"{pool.location}/{PART.path} changed meanwhile; another driver works on the pool")


# Purge


def purge(pool: Store, scratch: Path, check: Check) -> Purged:
    """Take out of the pool what its list names.

    Args:
        pool: held by the caller's lease.
        scratch: a folder on this disk.
        check: called before each write; raises when the lease is lost.
    """
    before = known_rules(pool)
    rules = with_bytes_of(pool, before)
    check()
    if rules != before:
        put_rules(pool, rules, scratch)
    done, held, parts = Purged(), Rules(rules), _Parts(pool)
    touched = [shard for shard in parts.shards if _is_touched(parts, shard, held)]
    for part in _fits_that_are_pictures(parts, touched, held):
        check()
        pool.delete(part.path)
        done.num_fits += 1
    for shard in touched:
        _mend(parts, shard, held, done=done, scratch=scratch, check=check)
    for place in OF_POOL:
        for path in unnamed_objects(pool, place):
            check()
            done.num_deleted += 1
            done.deleted_bytes += pool.size(path)
            pool.delete(path)
    check()
    put_rules(pool, [replace(rule, applied=True) for rule in rules], scratch)
    return done


def _is_touched(parts: _Parts, shard: int, rules: Rules) -> bool:
    return any(pc.any(named).as_py() for _, named in _named_rows(parts, shard, rules))


def _fits_that_are_pictures(parts: _Parts, shards: list[int], rules: Rules) -> list[Part]:
    """Fits one of whose centroids is the vector of a picture that goes; they are made again without it."""
    vectors: dict[int, list[np.ndarray]] = {}
    for shard in shards:
        by_url = _ids_by_url(parts, shard, rules)
        for part in (part for name in VECTOR_TABLES for part in parts.of(name, shard)):
            table = read_part(parts.store, part)
            found = vectors_of(table.filter(_doomed(table, by_url, rules)))
            vectors.setdefault(found.shape[1], []).append(found)
    fits = []
    for part in (part for name in _FITS_OF_VECTORS for part in _fit_parts(parts.store, name)):
        held = read_part(parts.store, part, ["vector"])["vector"].drop_null()  # the lowest level names none of its own
        centroids = np.array(held.to_pylist(), np.float32)  # [K, D]
        if not len(centroids) or centroids.shape[1] not in vectors:
            continue
        unit = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
        if any((found @ unit.T > _SAME_VECTOR).any() for found in vectors[centroids.shape[1]]):
            fits.append(part)
    return fits


def _fit_parts(pool: Store, name: str) -> list[Part]:
    paths = [path for path in pool.list(f"fits/{name}") if path.endswith(".parquet")]
    return [Part("pool", path.rpartition("/")[0], int(path[-17:-8])) for path in paths]


def _mend(parts: _Parts, shard: int, rules: Rules, *, done: Purged, scratch: Path, check: Check) -> None:
    """Parts of one shard without what goes. ``hashes`` and ``images`` last: by them a second run finds the shard."""
    pool, by_url = parts.store, _ids_by_url(parts, shard, rules)
    for name in (*VECTOR_TABLES, "pca_hashes", "opinions", "detections", "hashes", "images"):
        for part in parts.of(name, shard):
            table = read_part(pool, part)
            named = _doomed(table, by_url, rules)
            if not pc.any(named).as_py():
                continue
            mended = table
            for place in (place for place in OF_POOL if place.table == name):
                check()
                mended = rewritten(pool, place, mended, named, shard=shard, scratch=scratch)
            mended = _without_bytes(mended, named, by_url) if name == "images" else mended.filter(pc.invert(named))
            if mended.equals(table):  # an address that was named before
                continue
            held = table.filter(any_of(pc.and_(named, pc.is_valid(table["sha256"]))))
            done.image_ids.update(held["image_id"].to_pylist())
            done.num_parts += 1
            check()
            swap(pool, part, mended, scratch)


def _without_bytes(images: pa.Table, named: pa.Array, by_url: pa.Array) -> pa.Table:
    """Rows of ``images`` that go, as fetch writes those that it does not fetch or does not keep."""
    unasked = any_of(pc.is_in(images["image_id"], value_set=by_url))
    values = {"ok": pa.scalar(False), "reason": pa.scalar(TAKEN_DOWN), "transient": pa.scalar(False)}
    for at, column in enumerate(images.schema):
        if column.name in values:
            changed = pc.if_else(named, values[column.name], images[column.name])
        elif column.name in _OF_BYTES or column.name in _OF_VISIT:
            mask = named if column.name in _OF_BYTES else unasked
            changed = pc.if_else(mask, pa.scalar(None, column.type), images[column.name])
        else:
            continue
        images = images.set_column(at, column, changed)
    return images
