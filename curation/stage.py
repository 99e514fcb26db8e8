"""The contract between a stage and the runner.

Two shapes, plain classes. A ``ShardStage`` turns the tables of one shard into its part of the tables that it writes. A
``GlobalStage`` sees all shards, and does its heavy work through ``map``: tasks over parts, in process or over Ray, each
committed, skipped when done and retried like a shard. Neither commits anything itself, so neither can half-write.

A stage file is: a frozen config, pure functions on arrays (these carry the tests), a short class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pyarrow as pa

from curation.modelfacts import ModelFacts
from curation.schema import TABLES, Part, Role, Root
from curation.store import Within
from training.config import Config

DEFAULT_MEMORY_BYTES = 1_500_000_000  # of one task; a recipe says another in execution.task_memory_mb


class OutageError(RuntimeError):
    """What a stage needs from outside cannot be had: nothing was recorded, and trying again at once would not help."""


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of plain data, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one task of a stage needs."""

    cpus: float = 1.0  # 0: waits on the network rather than computes; such tasks have a small pool of their own
    gpus: float = 0.0
    max_tasks: int | None = None  # at most so many tasks at once over the whole cluster; None = as many as fit
    speculative: bool = True  # a straggler may be run twice; never true for what visits other people's servers


class ObjectTar(Protocol):
    """A tar being written into a root. It is stored under its own digest by ``close``; until then nobody sees it."""

    def add(self, name: str, data: bytes) -> int:
        """Append one member; the offset of its first byte inside the tar."""

    def close(self) -> str:
        """Store the tar; its path inside the root, ``<folder>/<shard>-<digest>.tar``, empty when nothing was added."""


class TaskIO(Protocol):
    """All that a stage or a task may touch. Given by the runner, in whatever process the work runs."""

    shard: int  # -1 for a task of a GlobalStage
    role: Role  # of the shard
    # image_id, sha256, in id order: what the verdict `after` kept in the shard; for a facts stage only those of them
    # that no earlier generation holds.
    rows: pa.Table
    scratch: Path  # an empty folder on the worker's disk, gone when the task ends
    # What a task may hold in arrays (`execution.task_memory_mb`). It cuts blocks and groups; no byte may depend on it.
    memory_bytes: int
    device: Literal["cpu", "cuda"]  # where arrays may be computed: cuda only for a task that was given a GPU

    def part(self, table: str, index: int) -> Part:
        """The part of a table, wherever the recipe's models put that table."""

    def parts(self, table: str) -> list[Part]:
        """All parts of a table that this run has, in order of index: for tables with one part a task."""

    def read(self, part: Part, columns: Sequence[str] | None = None, *, within: Within | None = None) -> pa.Table:
        """One part of any table; ``within`` (column, first value, value behind the last) reads only these rows."""

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The part of table ``name`` for this task's shard."""

    def kept(self, verdict: str, shard: int) -> pa.Table:
        """image_id, sha256 of the rows that a verdict kept in a shard, in id order.

        For shards of query sets and benchmarks, which meet no verdict after safety, what safety kept.
        """

    def blob(self, path: str, offset: int, size: int, root: Root = "pool") -> bytes:
        """A range of a stored object."""

    def size(self, path: str, root: Root = "pool") -> int:
        """Bytes of a stored object."""

    def tar(self, folder: str, root: Root = "pool") -> ObjectTar:
        """Start a tar in ``folder``."""


class Context(Protocol):
    """What a stage may ask about the run while it is planned, in the driver."""

    def shards(self, *roles: Role) -> list[int]:
        """All shards of these roles, ascending."""

    def sources(self) -> pa.Table:
        """The table ``sources``."""

    def part(self, table: str, index: int) -> Part:
        """The part of a table, wherever the recipe's models put that table."""

    def parts(self, table: str) -> list[Part]:
        """All parts of a table that this run has, in order of index."""

    def digest(self, part: Part) -> str:
        """Content digest of a committed part."""

    def num_rows(self, part: Part) -> int:
        """Rows of a committed part."""

    def read(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """A committed part, for what is told of it; plans go by digests."""

    def is_done(self, stage: Stage, task: Task) -> bool:
        """Whether a task has nothing left to do."""

    def discard(self, parts: Iterable[Part]) -> None:
        """Remove parts that nothing will read again: tables in which a stage keeps what it has reached."""

    def clear(self, tables: Iterable[str]) -> None:
        """Remove whatever lies in such tables, also what other settings or a run that was killed left there."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of a module-level function, ``function(io, **args) -> pa.Table``, whose table is the part ``writes``.

    It is done when that part is there with the fingerprint of (stage, function, args, content of ``reads``). With
    ``also`` the function returns a tuple of tables, for ``writes`` and then for these.
    """

    function: Callable[..., pa.Table | tuple[pa.Table, ...]]
    writes: Part
    also: tuple[Part, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)  # JSON-able: ids, names, small numbers
    reads: tuple[Part, ...] = ()
    once: bool = False  # a fit: when it is there it stays, whatever its inputs became since


Map = Callable[[Sequence[Task]], None]


class Stage:
    """What both shapes declare. ``config`` is the section of the recipe that the stage reads."""

    name: ClassVar[str]
    section: ClassVar[str]  # of the recipe: the dotted path under which its config stands, for messages
    reads: ClassVar[tuple[str, ...]]
    writes: ClassVar[tuple[str, ...]]
    version: ClassVar[int] = 1
    resources: Resources = Resources()
    roles: ClassVar[tuple[Role, ...]] = ("pool",)
    # Facts enter a fingerprint by their model's folder, because the verdict read beside them fixes the rows. A stage
    # that judges the facts themselves (was it fetched?) names them here, and they enter by content.
    by_content: ClassVar[tuple[str, ...]] = ()
    # Tables that are asked about single rows, and are in no fingerprint: a new takedown rule changes the rows that it
    # names and makes nothing else stale. One that is not there is empty.
    consults: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def fingerprint_values(self) -> dict[str, Any]:
        """What of the recipe decides the content of this stage's output."""
        return self.config.fingerprint_values()

    def preflight(self) -> None:
        """Check what only this stage knows, such as weights that must be there; raises ConfigError, and is quick."""

    def models(self) -> list[ModelFacts]:
        """The models that it runs, told without loading them: for people; raises ConfigError where one is not there."""
        return []

    def folder(self, table: str, context: Context) -> str:
        """Folder of an output table. Model stages add a key, so that two never share one: ``TABLE/MODEL-KEY``."""
        del context
        return table


class ShardStage(Stage):
    """Tables of one shard in, its part of each table in ``writes`` out.

    A facts stage is asked for ``io.rows`` and answers exactly these rows; rows that earlier runs computed with the same
    model are carried over by the runner. ``after`` names the verdict that lets its rows through; shards of query sets
    and benchmarks meet no verdict after safety.
    """

    kind: ClassVar[str]  # facts | verdict | output
    after: ClassVar[str | None] = None
    # Of facts that visit other people's servers: failure classes (column ``reason`` of the first table) that may pass.
    # A command that is told to retry computes these rows once more; all others are carried over.
    transient: ClassVar[tuple[str, ...]] = ()
    permanent: ClassVar[tuple[str, ...]] = ()

    def setup(self) -> None:
        """Load what is needed once a worker: weights, sessions, fits are read through ``io`` on first use."""

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """One table for each name in ``writes``, rows in id order."""
        raise NotImplementedError


class GlobalStage(Stage):
    """Work over all shards, through ``map``. Holds ids and small arrays only, never all vectors or bytes."""

    def run(self, context: Context, map: Map) -> None:  # noqa: A002 - the word the design uses
        """Plan tasks, map them, plan the next ones from what they wrote."""
        raise NotImplementedError

    def told(self, context: Context) -> Iterable[str]:
        """Lines for the user, once all is done that a run found undone of this stage."""
        del context
        return ()


def keyed_folder(table: str, model: str, *parts: Any) -> str:
    """``TABLE/MODEL-KEY`` with eight hex digits of the digest of everything that decides the facts."""
    return f"{table}/{model}-{digest_of(list(parts))[:8]}"


def empty_table(name: str) -> pa.Table:
    """A table of the schema with no row."""
    return TABLES[name].schema.empty_table()


def verdict_table(
    name: str,
    rows: pa.Table,
    *,
    reason: Sequence[str | None] | pa.Array,
    score: Any = None,
    threshold: Any = None,
    **extra: Any,
) -> pa.Table:
    """A verdict over ``rows`` (image_id, sha256): dropped where ``reason`` is given.

    ``score`` and ``threshold`` are sequences of length N with None where nothing was judged, or None for all;
    ``extra`` holds the further columns of the verdict.
    """
    num_rows = rows.num_rows
    reasons = reason if isinstance(reason, pa.Array) else pa.array(reason, pa.string())
    columns: dict[str, Any] = {
        "image_id": rows["image_id"],
        "sha256": rows["sha256"],
        "keep": reasons.is_null(),
        "reason": reasons,
        "score": [None] * num_rows if score is None else score,
        "threshold": [None] * num_rows if threshold is None else threshold,
        **extra,
    }
    schema = TABLES[name].schema
    arrays = []
    for column in schema:
        values = columns[column.name]
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            arrays.append(values.cast(column.type))
        else:
            arrays.append(pa.array(values, column.type, from_pandas=True))
    return pa.Table.from_arrays(arrays, schema=schema)
