"""Registration of the sources of a recipe in its pool: shards of urls first, then the table that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from curation.ingest.register import register
from curation.schema import Part, first_shard
from curation.stage import digest_of
from curation.store import Store, put_text, read_footer, read_part, write_part
from pipelines.crawl import crawled_lines
from pipelines.curate import CurateRecipe
from pipelines.plan import SOURCES
from pipelines.preflight import named_sources

STAMPS = "sources.json"  # of the pool: which files the rows of each source were read from


def register_sources(
    recipe: CurateRecipe, pool: Store, scratch: Path, unregistered: list[Part] | None, say: Callable[[str], None]
) -> pa.Table:
    """Register the sources; a dry run registers nothing and gathers the parts that would be written."""
    previous = read_part(pool, SOURCES) if pool.exists(SOURCES.path) else None
    if previous is not None and unregistered is None:
        _forget_half_registered(pool, previous, scratch)

    def write(shard: int, table: pa.Table) -> None:
        if unregistered is None:
            _commit(pool, Part("pool", "urls", shard), table, scratch)
        else:
            unregistered.append(Part("pool", "urls", shard))

    before = _stamps(pool)
    stamps = dict(before)
    sources = register(
        named_sources(recipe),
        previous,
        shard_rows=recipe.shard_rows,
        write=write,
        crawled=lambda name: crawled_lines(pool, name),
        stamps=stamps,
    )
    if previous is None or not sources.equals(previous):
        _say_registered(sources, previous, say)
        if unregistered is None:
            _commit(pool, SOURCES, sources, scratch)
    if unregistered is None and stamps != before:
        put_text(pool, STAMPS, json.dumps(stamps, sort_keys=True), scratch)
    return sources


def _stamps(pool: Store) -> dict[str, str]:
    """What the sources of a pool were read from, by name; what is damaged says nothing, and all is read again."""
    try:
        found = json.loads(pool.read(STAMPS)) if pool.exists(STAMPS) else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _say_registered(sources: pa.Table, previous: pa.Table | None, say: Callable[[str], None]) -> None:
    before = {} if previous is None else {row["name"]: row["num_rows"] for row in previous.to_pylist()}
    for row in sources.to_pylist():
        more = row["num_rows"] - before.get(row["name"], 0)
        if more:
            say(f"register {row['role']} {row['name']!r}: {more:,} rows more, {row['num_rows']:,} in all")


def _forget_half_registered(pool: Store, sources: pa.Table, scratch: Path) -> None:
    """Cut the last shard of each source to the rows that ``sources`` knows: a command was killed before it said so."""
    for row in sources.to_pylist():
        if row["num_shards"] == 0:
            continue
        part = Part("pool", "urls", first_shard(row["source_id"]) + row["num_shards"] - 1)
        known = row["num_rows"] - (row["num_shards"] - 1) * row["shard_rows"]
        footer = read_footer(pool, part)
        if footer is not None and footer.num_rows > known:
            _commit(pool, part, read_part(pool, part).slice(0, known), scratch)


def _commit(store: Store, part: Part, table: pa.Table, scratch: Path) -> None:
    path = scratch / "register.parquet"
    origin = digest_of(["register", 1])
    footer = write_part(table, path, stage="register", version=1, fingerprint=origin, inputs={})
    there = read_footer(store, part)
    if there is None or there.digest != footer.digest:
        store.replace(part.path, path, store.tag(part.path))
