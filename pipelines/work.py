"""What a worker does with one job: read, run, commit. The same code in process, in a Ray actor, on any node.

A job is small and picklable: names, numbers and folders. The worker builds the stages of the recipe once and keeps
them, so that weights are loaded once a process.
"""

from __future__ import annotations

import importlib
import resource
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from curation.lease import check_lease
from curation.schema import (
    LAST_VERDICT_OF_REFERENCES,
    LOGS,
    TABLES,
    VECTOR_TABLES,
    VERDICTS,
    Part,
    Role,
    Root,
    source_of_shard,
    table_of,
)
from curation.stage import DEFAULT_MEMORY_BYTES, OutageError, ShardStage, Stage
from curation.store import Footer, Store, Within, open_store, read_footer, read_part, write_part
from pipelines.scratch import scratch_folder
from training.data.tars import TarWriter


class CommitError(RuntimeError):
    """A part was changed by somebody else while it was being made."""


class StageError(RuntimeError):
    """A stage broke its contract: a wrong schema, missing rows."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """What all jobs of one run share: roots, leases, the recipe, the roles of the sources."""

    pool: str
    run: str
    pool_token: str
    run_token: str
    recipe: str  # JSON of the resolved recipe
    roles: Mapping[int, Role]  # source_id -> role
    memory_bytes: int = DEFAULT_MEMORY_BYTES  # what one task may hold in arrays


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What goes into the footer of the part that a job writes."""

    stage: str
    version: int
    fingerprint: str
    inputs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard of a ShardStage, or one task of a GlobalStage."""

    stage: str
    shard: int
    origin: Origin
    folders: Mapping[str, str]  # table -> folder, for tables whose folder is not their name
    parts: Mapping[str, tuple[int, ...]]  # table -> indices of its parts, for tables with one part a task
    writes: tuple[Part, ...]
    function: str | None = None  # module:name of a task; None for a shard
    args: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False  # carry nothing over: the user asked for it again
    retry: tuple[str, ...] = ()  # failure classes whose rows are not carried over

    @property
    def label(self) -> str:
        """For messages: stage and shard or part."""
        where = f"shard {self.shard}" if self.shard >= 0 else f"part {self.writes[0].index}"
        return f"{self.stage} {where}"


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of a job."""

    footers: dict[Part, Footer]
    num_rows: int  # computed, without those carried over
    wall_s: float
    cpu_s: float
    peak_bytes: int  # of the process, ever
    pid: int


class Tar:
    """A tar written to scratch and stored under its digest by ``close``."""

    def __init__(self, store: Store, folder: str, stem: str, scratch: Path, where: Where) -> None:
        self._store = store
        self._where = where
        self._folder = folder
        self._stem = stem
        self._path = scratch / f"{uuid.uuid4().hex}.tar"
        self._writer: TarWriter | None = None

    def add(self, name: str, data: bytes) -> int:
        """Append one member; the offset of its first byte."""
        if self._writer is None:
            self._writer = TarWriter(self._path)
        return self._writer.add(name, data)

    def close(self) -> str:
        """Store the tar, once; its path inside the root, empty when nothing was added."""
        if self._writer is None:
            return ""
        self._writer.close()
        check_leases(self._where)
        path = f"{self._folder}/{self._stem}-{self._writer.sha256[:16]}.tar"
        self._store.create_named(path, self._path)
        return path


class WorkerIO:
    """What a stage or a task may touch: see ``curation.stage.TaskIO``."""

    def __init__(self, job: Job, where: Where, stage: Stage, scratch: Path) -> None:
        self.shard = job.shard
        self.role: Role = where.roles.get(source_of_shard(job.shard), "pool") if job.shard >= 0 else "pool"
        self.rows: pa.Table = pa.table({"image_id": pa.array([], pa.int64()), "sha256": pa.array([], pa.string())})
        self.scratch = scratch
        self.memory_bytes = where.memory_bytes
        self.device: Literal["cpu", "cuda"] = "cuda" if stage.resources.gpus else "cpu"
        self._job = job
        self._where = where
        self._stores: dict[Root, Store] = {"pool": _store(where.pool), "run": _store(where.run)}
        self._allowed = {*stage.reads, *stage.writes, *stage.consults, *VERDICTS}
        self._may_be_missing = frozenset((*stage.consults, *stage.writes))

    def part(self, table: str, index: int) -> Part:
        """The part of a table."""
        return Part(TABLES[table].root, self._job.folders.get(table, table), index)

    def parts(self, table: str) -> list[Part]:
        """All parts of a table with one part a task."""
        return [self.part(table, index) for index in self._job.parts.get(table, ())]

    def read(self, part: Part, columns: Sequence[str] | None = None, *, within: Within | None = None) -> pa.Table:
        """One part of a declared table; one that is only consulted, or one's own, may be missing and is empty then."""
        name = table_of(part)
        if name not in self._allowed:
            raise StageError(f"stage {self._job.stage!r} reads {name!r} without declaring it")
        if name in self._may_be_missing and not self._stores[part.root].exists(part.path):
            empty = TABLES[name].schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        return read_part(self._stores[part.root], part, columns, within=within)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The part of a table for this shard; part 0 of a table that has only one."""
        return self.read(self.part(name, 0 if TABLES[name].parts == "single" else self.shard), columns)

    def kept(self, verdict: str, shard: int) -> pa.Table:
        """image_id, sha256 of the rows that a verdict kept in a shard, in id order."""
        if self._where.roles.get(source_of_shard(shard), "pool") != "pool":
            last = VERDICTS.index(LAST_VERDICT_OF_REFERENCES)
            verdict = VERDICTS[min(VERDICTS.index(verdict), last)]
        table = self.read(self.part(verdict, shard), ["image_id", "sha256", "keep"])
        return table.filter(table["keep"]).select(["image_id", "sha256"])

    def blob(self, path: str, offset: int, size: int, root: Root = "pool") -> bytes:
        """A range of a stored object."""
        return self._stores[root].read_range(path, offset, size)

    def size(self, path: str, root: Root = "pool") -> int:
        """Bytes of a stored object."""
        return self._stores[root].size(path)

    def tar(self, folder: str, root: Root = "pool") -> Tar:
        """Start a tar in ``folder``, named by the shard or the part that it belongs to."""
        index = self.shard if self.shard >= 0 else self._job.writes[0].index
        return Tar(self._stores[root], folder, f"{index:09d}", self.scratch, self._where)


_STORES: dict[str, Store] = {}
_STAGES: dict[str, dict[str, Stage]] = {}


def _store(location: str) -> Store:
    if location not in _STORES:
        _STORES[location] = open_store(location)
    return _STORES[location]


def _stage(where: Where, name: str) -> Stage:
    from pipelines.curate import CurateRecipe, build_stages

    key = where.recipe + where.run_token  # a later command may find other files behind the same recipe
    if key not in _STAGES:
        _STAGES.clear()
        recipe = CurateRecipe.model_validate_json(where.recipe)
        _STAGES[key] = {stage.name: stage for stage in build_stages(recipe)}
    return _STAGES[key][name]


_READY: set[tuple[str, str, str]] = set()


def execute(job: Job, where: Where) -> Done:
    """Run one job and commit what it made."""
    stage = _stage(where, job.stage)
    started, cpu = time.perf_counter(), time.process_time()
    with scratch_folder() as scratch:
        io = WorkerIO(job, where, stage, scratch)
        if isinstance(stage, ShardStage):
            if (where.recipe, where.run_token, stage.name) not in _READY:
                stage.setup()
                _READY.add((where.recipe, where.run_token, stage.name))
            made, num_rows = _run_shard(stage, io, job)
        else:
            assert job.function is not None
            module, _, name = job.function.partition(":")
            returned = getattr(importlib.import_module(module), name)(io, **job.args)
            tables = returned if isinstance(returned, tuple) else (returned,)
            made, num_rows = dict(zip(job.writes, tables, strict=True)), tables[0].num_rows
            for part, table in made.items():
                _check_schema(job.stage, part, table)
        check_leases(where)
        # The first table is the one that says what is done: it goes last.
        footers = {part: _commit(table, part, job, where, scratch) for part, table in reversed(made.items())}
    return Done(
        footers=footers,
        num_rows=num_rows,
        wall_s=time.perf_counter() - started,
        cpu_s=time.process_time() - cpu,
        peak_bytes=peak_bytes(),
        pid=_pid(),
    )


def check_leases(where: Where) -> None:
    """Before anything is stored: ``LeaseLostError`` when the driver is gone. An empty token asks for no lease."""
    for location, token in ((where.pool, where.pool_token), (where.run, where.run_token)):
        if token:
            check_lease(_store(location), token)


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pid() -> int:
    import os

    return os.getpid()


def _run_shard(stage: ShardStage, io: WorkerIO, job: Job) -> tuple[dict[Part, pa.Table], int]:
    """Tables of the shard, facts of earlier generations carried over; number of rows that were computed."""
    wanted = io.kept(stage.after, io.shard) if stage.after else None
    carried: dict[str, pa.Table] = {}
    if wanted is not None:
        io.rows = wanted
        if stage.kind == "facts":
            carried = {} if job.fresh else _carried(io, job)
            held = [carried[name] for name in carried if name not in LOGS]
            io.rows = _missing(wanted, [table.filter(pc.invert(failed_with(table, job.retry))) for table in held])
    fresh = stage.run(io.shard, io)
    made = {}
    for part, name in zip(job.writes, stage.writes, strict=True):
        table = fresh[name]
        _check_schema(stage.name, part, table)
        _check(stage, name, table, io)
        if name in carried:
            old = carried[name]
            if name not in LOGS:  # every visit was made
                old = old.filter(pc.invert(pc.is_in(old["image_id"], value_set=io.rows["image_id"].combine_chunks())))
            table = pa.concat_tables([old.cast(table.schema), table])
            order = pc.sort_indices(table, sort_keys=[("image_id", "ascending")])
            table = table.take(order)
        made[part] = table
    return made, io.rows.num_rows if wanted is not None else next(iter(made.values())).num_rows


def _carried(io: WorkerIO, job: Job) -> dict[str, pa.Table]:
    """Rows that parts of the same model hold already, by table; empty where a part is missing or of another origin."""
    tables = {}
    for part, name in zip(job.writes, _stage(io._where, job.stage).writes, strict=True):
        footer = read_footer(io._stores[part.root], part)
        if footer is None and name in LOGS:
            tables[name] = TABLES[name].schema.empty_table()
            continue
        if footer is None or footer.fingerprint != job.origin.fingerprint:
            return {}
        tables[name] = read_part(io._stores[part.root], part)
    return tables


def failed_with(facts: pa.Table, classes: Sequence[str]) -> pa.Array:
    """Which rows of a facts table failed with one of these classes."""
    if not classes or "reason" not in facts.column_names:
        return pa.array([False] * facts.num_rows, pa.bool_())
    return pc.is_in(facts["reason"], value_set=pa.array(classes, pa.string()))


def _missing(wanted: pa.Table, tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of ``wanted`` that one of the tables does not hold, for these bytes."""
    if not tables:
        return wanted
    missing = pa.array([False] * wanted.num_rows, pa.bool_())
    for table in tables:
        missing = pc.or_(missing, pc.invert(covered(wanted, table)))
    return wanted.filter(missing)


def covered(wanted: pa.Table, facts: pa.Table) -> pa.Array:
    """Which rows of ``wanted`` (image_id, sha256) a facts table holds; a null sha256 asks for the id only."""
    place = pc.index_in(wanted["image_id"], value_set=facts["image_id"].combine_chunks())
    there = pc.is_valid(place)
    if "sha256" not in facts.column_names:
        return there
    same = pc.equal(pc.take(facts["sha256"], place), wanted["sha256"])
    return pc.and_(there, pc.if_else(pc.is_null(wanted["sha256"]), True, pc.fill_null(same, False)))


def _check_schema(stage: str, part: Part, table: pa.Table) -> None:
    name = table_of(part)
    schema = TABLES[name].schema
    same_types = name in VECTOR_TABLES or table.schema.types == schema.types
    if table.schema.names != schema.names or not same_types:
        raise StageError(f"stage {stage!r}: table {name!r} is\n{table.schema}\nand should be\n{schema}")


def _check(stage: ShardStage, name: str, table: pa.Table, io: WorkerIO) -> None:
    if TABLES[name].kind in ("facts", "verdict") and name not in LOGS:
        expected = io.rows["image_id"] if stage.after else table["image_id"]
        if not table["image_id"].combine_chunks().equals(expected.combine_chunks()):
            raise StageError(f"stage {stage.name!r}: table {name!r} does not answer its rows one by one, in order")


def _commit(table: pa.Table, part: Part, job: Job, where: Where, scratch: Path) -> Footer:
    store = _store(where.pool if part.root == "pool" else where.run)
    path = scratch / uuid.uuid4().hex
    tag = store.tag(part.path)
    origin = job.origin
    footer = write_part(
        table,
        path,
        stage=origin.stage,
        version=origin.version,
        fingerprint=origin.fingerprint,
        inputs=origin.inputs,
        row_group_rows=TABLES[table_of(part)].row_group_rows,
    )
    stored = store.create(part.path, path) if tag is None else store.replace(part.path, path, tag)
    if not stored:
        there = read_footer(store, part)
        if there is None or (there.fingerprint, there.digest) != (footer.fingerprint, footer.digest):
            raise CommitError(f"{part.path} changed while {job.label} was running")
    return footer


def kind_of(error: BaseException) -> Literal["config", "outage", "lease", "task"]:
    """How the runner answers an error of a job."""
    from curation.lease import LeaseLostError
    from training.config import ConfigError

    if isinstance(error, ConfigError):
        return "config"
    if isinstance(error, OutageError):
        return "outage"
    return "lease" if isinstance(error, LeaseLostError) else "task"
