"""What is done, what is missing, what is stale and why: the driver's view of a pool and a run.

A part is done when it is there and its fingerprint is the plan's. The fingerprint is made of the stage, its version,
the values of the recipe that it reads, and what it reads: verdicts and outputs by content, facts by the folder of their
model (the verdict beside them fixes the rows). Facts are done when, besides, they cover every row that is let through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.schema import (
    LAST_VERDICT_OF_REFERENCES,
    LOGS,
    TABLES,
    VERDICTS,
    Part,
    Role,
    Root,
    first_shard,
    part_of_group,
    source_of_shard,
    table_of,
)
from curation.stage import ShardStage, Stage, Task, digest_of
from curation.store import Footer, Store, read_footer, read_part
from pipelines.work import Job, Origin, covered, failed_with

SOURCES = Part("pool", "sources", 0)


@dataclass(frozen=True, kw_only=True)
class Undone:
    """A job that is to be done, and why."""

    job: Job
    why: str  # missing | stale: KEY | N rows


@dataclass(kw_only=True)
class Ledger:
    """Parts, shards and folders as the driver knows them; the ``Context`` that stages are planned with."""

    stores: Mapping[Root, Store]
    stages: Sequence[Stage]
    registered: pa.Table  # the table sources, as it is or, in a dry run, would be
    source_ids: Mapping[str, int]  # sources of this recipe
    unregistered: frozenset[Part] = frozenset()  # of a dry run: lines that would be registered
    last_folders: Mapping[str, str] = field(default_factory=dict)  # of the command before this one
    redo: frozenset[str] = frozenset()
    retry: frozenset[str] = frozenset()  # failure classes
    max_shards: int | None = None  # of pool sources together
    folders: dict[str, str] = field(default_factory=dict)
    task_parts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _footers: dict[Part, Footer | None] = field(default_factory=dict)
    _redone: set[Part] = field(default_factory=set)
    _sources: pa.Table | None = None

    # Context

    def sources(self) -> pa.Table:
        """The table ``sources``, those of this recipe only, in order of registration."""
        if self._sources is None:
            table = self.registered
            mine = pa.array(sorted(self.source_ids.values()), pa.int32())
            self._sources = table.filter(pc.is_in(table["source_id"], value_set=mine))
        return self._sources

    def roles(self) -> dict[int, Role]:
        """Role of each source."""
        return {row["source_id"]: row["role"] for row in self.sources().to_pylist()}

    def shards(self, *roles: Role) -> list[int]:
        """All shards of these roles, ascending."""
        found = []
        for row in self.sources().to_pylist():
            if row["role"] in roles:
                first = first_shard(row["source_id"])
                shards = list(range(first, first + row["num_shards"]))
                found += shards
        pool = [shard for shard in found if self.roles()[source_of_shard(shard)] == "pool"]
        left_out = set(pool[self.max_shards :]) if self.max_shards is not None else set()
        return sorted(set(found) - left_out)

    def part(self, table: str, index: int) -> Part:
        """The part of a table."""
        return Part(TABLES[table].root, self.folders.get(table, table), index)

    def parts(self, table: str) -> list[Part]:
        """All parts of a table with one part a task."""
        return [self.part(table, index) for index in self.task_parts.get(table, ())]

    def digest(self, part: Part) -> str:
        """Content digest of a committed part."""
        return self._there(part).digest

    def num_rows(self, part: Part) -> int:
        """Rows of a committed part."""
        return self._there(part).num_rows

    def read(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """A committed part."""
        return read_part(self.stores[part.root], part, columns)

    def is_done(self, stage: Stage, task: Task) -> bool:
        """Whether a task has nothing left to do."""
        return self.undone_task(stage, task) is None

    def discard(self, parts: Iterable[Part]) -> None:
        """Remove parts that nothing will read again."""
        for part in parts:
            self.stores[part.root].delete(part.path)
            self.forget(part)

    def clear(self, tables: Iterable[str]) -> None:
        """Remove whatever lies in tables of what is under way."""
        run = self.stores["run"]
        for table in tables:
            for path in list(run.list(table)):
                run.delete(path)
            self.task_parts.pop(table, None)
        for part in [part for part in self._footers if part.folder in tables]:
            self.forget(part)

    def _there(self, part: Part) -> Footer:
        footer = self.footer(self.actual(part))
        if footer is None or part in self.unregistered:
            raise LookupError(f"{part.path} is not there yet")
        return footer

    # Parts

    def footer(self, part: Part) -> Footer | None:
        """Footer of a part, None where it is missing."""
        if part not in self._footers:
            self._footers[part] = read_footer(self.stores[part.root], part)
        return self._footers[part]

    def committed(self, footers: Mapping[Part, Footer]) -> None:
        """Take note of what a job wrote."""
        self._footers.update(footers)
        self._redone.update(footers)

    def forget(self, part: Part) -> None:
        """A part was removed."""
        self._footers[part] = None

    def actual(self, part: Part) -> Part:
        """The part that is read for it: references meet no verdict after safety."""
        table = table_of(part)
        if table not in VERDICTS or table == "selection":
            return part
        late = VERDICTS.index(table) > VERDICTS.index(LAST_VERDICT_OF_REFERENCES)
        if late and self.roles().get(source_of_shard(part.index), "pool") != "pool":
            return self.part(LAST_VERDICT_OF_REFERENCES, part.index)
        return part

    def place(self, stage: Stage) -> None:
        """Fix the folders of what a stage writes: what it reads is committed by now."""
        for table in stage.writes:
            self.folders[table] = stage.folder(table, self)

    # Fingerprints

    def shard_inputs(self, stage: ShardStage, shard: int) -> dict[str, Any]:
        """What the fingerprint of a shard's parts is made of."""
        reads: dict[str, str] = {}
        for table in stage.reads:
            if stage.kind == "facts" and table in VERDICTS:
                continue  # facts are told by the rows that they cover
            kind = TABLES[table]
            if kind.kind == "facts" and table not in stage.by_content:
                reads[table] = self.folders.get(table, table)
            elif kind.parts == "group":
                parts = self.parts(table)  # none of a stage that has nothing to do
                if parts and self.roles()[source_of_shard(shard)] in kind.roles:
                    reads[table] = self.digest(part_of_group(parts, shard))
            elif kind.parts == "task":
                reads[table] = digest_of([[part.index, self.digest(part)] for part in self.parts(table)])
            else:
                reads[table] = self.digest(self.part(table, 0 if kind.parts == "single" else shard))
        return {"config": stage.fingerprint_values(), "reads": reads}

    def task_inputs(self, stage: Stage, task: Task) -> dict[str, Any]:
        """What the fingerprint of a task's part is made of."""
        contents: dict[str, list[Any]] = {}
        for part in task.reads:
            table = table_of(part)
            by_folder = TABLES[table].kind == "facts" and table not in stage.by_content
            entry = part.folder if by_folder else [part.index, self.digest(part)]
            listed = contents.setdefault(table, [])
            if entry not in listed[-1:]:
                listed.append(entry)
        return {
            "config": stage.fingerprint_values(),
            "task": {"function": _name_of(task.function), **task.args},
            "reads": {table: digest_of(entries) for table, entries in contents.items()},
        }

    # Jobs

    def undone_shard(self, stage: ShardStage, shard: int) -> Undone | None:
        """The job of a shard, None when its parts are done."""
        inputs = self.shard_inputs(stage, shard)
        origin = _origin(stage, inputs)
        parts = tuple(self.part(table, shard) for table in stage.writes)
        why = self._why(stage, parts, origin) or (
            self._uncovered(stage, parts, shard) or self._failed(stage, parts[0]) if stage.kind == "facts" else None
        )
        return None if why is None else Undone(job=self._job(stage, origin, parts, shard=shard), why=why)

    def undone_task(self, stage: Stage, task: Task) -> Undone | None:
        """The job of a task, None when its part is done."""
        inputs = self.task_inputs(stage, task)
        if task.once:
            # A fit stays, whatever its inputs became since, unless it was tried out on a part of the pool.
            inputs["max_shards"] = self.max_shards
            fitted = self.footer(task.writes)
            stands = fitted is not None and fitted.inputs.get("max_shards") in (None, self.max_shards)
            if stands and not self._to_redo(stage, task.writes):
                return None
        origin = _origin(stage, inputs)
        parts = (task.writes, *task.also)
        why = self._why(stage, parts, origin)
        if why is None:
            return None
        job = self._job(stage, origin, parts, function=_name_of(task.function), args=task.args)
        return Undone(job=job, why=why)

    def changed_config(self, stage: Stage, footer: Footer) -> str:
        """The first setting that a part was made with and that is another now."""
        inputs = {**footer.inputs, "config": stage.fingerprint_values()}
        return changed_key(stage, footer, _origin(stage, inputs))

    def stale_rows(self, stage: ShardStage, shards: Iterable[int]) -> int:
        """Rows of facts that were made with other settings and would be made again."""
        total = 0
        for shard in shards:
            part = self.part(stage.writes[0], shard)
            footer = self.footer(part)
            if footer is not None and footer.fingerprint != _origin(stage, self.shard_inputs(stage, shard)).fingerprint:
                total += footer.num_rows
        return total

    def rows_elsewhere(self, stage: ShardStage) -> int:
        """Rows of facts that the last command had in another folder, and that this one would make in a new one."""
        table = stage.writes[0]
        before = self.last_folders.get(table)
        if before is None or before == self.folders.get(table, table):
            return 0
        total = 0
        for shard in self.shards(*stage.roles):
            old = self.footer(Part(TABLES[table].root, before, shard))
            if old is not None and self.footer(self.part(table, shard)) is None:
                total += old.num_rows
        return total

    def _why(self, stage: Stage, parts: Sequence[Part], origin: Origin) -> str | None:
        for part in parts:
            if table_of(part) in LOGS:
                continue  # visits are not made again for the sake of their record
            footer = self.footer(part)
            if footer is None:
                return "missing"
            if footer.fingerprint != origin.fingerprint:
                return f"stale: {changed_key(stage, footer, origin)}"
            if self._to_redo(stage, part):
                return "stale: --redo"
        return None

    def _to_redo(self, stage: Stage, part: Part) -> bool:
        return stage.name in self.redo and part not in self._redone

    def _uncovered(self, stage: ShardStage, parts: Sequence[Part], shard: int) -> str | None:
        if stage.after is None:
            return None
        verdict = self.actual(self.part(stage.after, shard))
        rows = read_part(self.stores["run"], verdict, ["image_id", "sha256", "keep"])
        rows = rows.filter(rows["keep"])
        missing = pa.array([False] * rows.num_rows, pa.bool_())
        for part in parts:
            if table_of(part) not in LOGS:
                columns = [name for name in ("image_id", "sha256") if name in TABLES[table_of(part)].schema.names]
                facts = read_part(self.stores[part.root], part, columns)
                missing = pc.or_(missing, pc.invert(covered(rows, facts)))
        count = pc.sum(missing).as_py() or 0
        return f"{count:,} rows let in" if count else None

    def _classes(self, stage: Stage) -> tuple[str, ...]:
        """Failure classes that a stage knows and the command retries."""
        known = (*stage.transient, *stage.permanent) if isinstance(stage, ShardStage) else ()
        return tuple(name for name in known if name in self.retry)

    def _failed(self, stage: ShardStage, part: Part) -> str | None:
        """Rows that are to be tried again, once a command."""
        classes = self._classes(stage)
        if not classes or stage.after is None or part in self._redone:
            return None
        verdict = self.actual(self.part(stage.after, part.index))
        rows = read_part(self.stores["run"], verdict, ["image_id", "keep"])
        facts = read_part(self.stores[part.root], part, ["image_id", "reason"])
        failed = facts.filter(failed_with(facts, classes))["image_id"]
        count = pc.sum(pc.is_in(failed, value_set=rows.filter(rows["keep"])["image_id"].combine_chunks())).as_py() or 0
        return f"{count:,} rows to retry" if count else None

    def _job(
        self,
        stage: Stage,
        origin: Origin,
        parts: tuple[Part, ...],
        *,
        shard: int = -1,
        function: str | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> Job:
        tables = {*stage.reads, *stage.writes, *VERDICTS}
        return Job(
            stage=stage.name,
            shard=shard,
            origin=origin,
            folders={table: folder for table, folder in self.folders.items() if table in tables and table != folder},
            parts={table: self.task_parts[table] for table in stage.reads if table in self.task_parts},
            writes=parts,
            function=function,
            args=args or {},
            fresh=any(self._to_redo(stage, part) for part in parts),
            retry=() if parts[0] in self._redone else self._classes(stage),
        )


def _origin(stage: Stage, inputs: dict[str, Any]) -> Origin:
    fingerprint = digest_of([stage.name, stage.version, inputs])
    return Origin(stage=stage.name, version=stage.version, fingerprint=fingerprint, inputs=inputs)


def _name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def changed_key(stage: Stage, footer: Footer, origin: Origin) -> str:
    """Names what differs between what a part was made of and what it would be made of now."""
    if footer.version != origin.version:
        return f"{stage.name} is version {origin.version}, was {footer.version}"
    old, new = dict(_flat(footer.inputs)), dict(_flat(origin.inputs))
    changes = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    config = [key for key in changes if key.startswith("config.")]
    if config:
        key = config[0]
        more = f" and {len(config) - 1} more" if len(config) > 1 else ""
        name = ".".join(filter(None, (stage.section, key.removeprefix("config."))))
        return f"{name} {_short(old.get(key))} -> {_short(new.get(key))}{more}"
    asked = [key for key in changes if key.startswith("task.") and key in old and key in new]
    if len(asked) == 1 and not isinstance(new[asked[0]], list):
        return f"{asked[0].removeprefix('task.')} {_short(old[asked[0]])} -> {_short(new[asked[0]])}"
    reads = [key.removeprefix("reads.") for key in changes if key.startswith("reads.")]
    return f"{', '.join(reads)} changed" if reads else "its tasks are cut differently"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
