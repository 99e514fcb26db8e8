"""The driver of a run: goes through the stages in order and has done what is not done.

Consecutive stages that work by shard are one group: a shard goes on to the next stage as soon as it has done the one
before, so that shards are fetched while others are looked at. A stage over all shards waits for all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from curation.schema import TABLES, Part, table_of
from curation.stage import GlobalStage, ShardStage, Stage, Task
from pipelines.plan import Ledger, Undone
from pipelines.runner import Executor, Scheduler
from pipelines.work import Done, Job
from training.config import ConfigError

REDO_ROWS = 10_000  # facts of more rows than this are made again only when --redo names the stage


class NotDoneError(Exception):
    """A plan met tasks that are to be done before it can see further."""

    def __init__(self, undone: Sequence[Undone], num_tasks: int) -> None:
        self.undone = list(undone)
        self.num_tasks = num_tasks
        super().__init__(f"{len(self.undone)} of {num_tasks} tasks")


@dataclass(frozen=True, kw_only=True)
class PlanLine:
    """What one stage has to do: counts of shards or tasks."""

    stage: str
    num_done: int
    num_undone: int
    why: dict[str, int]  # reason -> count
    known: bool = True  # false: depends on stages that are not done yet


@dataclass(kw_only=True)
class StageCost:
    """What one stage cost in this command."""

    num_jobs: int = 0
    num_rows: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(kw_only=True)
class Summary:
    """What a command did."""

    costs: dict[str, StageCost] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)  # pid -> bytes

    @property
    def num_jobs(self) -> int:
        """Jobs that ran."""
        return sum(cost.num_jobs for cost in self.costs.values())

    def add(self, other: Summary) -> None:
        """Count what another command did, too."""
        for name, cost in other.costs.items():
            mine = self.costs.setdefault(name, StageCost())
            for value, more in vars(cost).items():
                setattr(mine, value, getattr(mine, value) + more)
        for pid, peak in other.peaks.items():
            self.peaks[pid] = max(peak, self.peaks.get(pid, 0))


def groups(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Consecutive stages by shard together, each stage over all shards alone."""
    for _, members in groupby(enumerate(stages), lambda pair: -1 if isinstance(pair[1], ShardStage) else pair[0]):
        yield [stage for _, stage in members]


def plan(ledger: Ledger, stages: Sequence[Stage]) -> list[PlanLine]:
    """What is missing and what is stale, stage by stage, as far as can be seen before it is done."""
    lines: list[PlanLine] = []
    blocked = False
    for group in groups(stages):
        if blocked:
            lines += [_unseen(ledger, stage) for stage in group]
            continue
        if isinstance(group[0], GlobalStage):
            line = _plan_global(ledger, group[0])
            lines.append(line)
            blocked = line.num_undone > 0
        else:
            found = _plan_shards(ledger, [stage for stage in group if isinstance(stage, ShardStage)])
            lines += found
            blocked = any(line.num_undone for line in found)
    return lines


def _plan_global(ledger: Ledger, stage: GlobalStage) -> PlanLine:
    ledger.place(stage)
    try:
        num_tasks = len(_walk(ledger, stage, do=None))
    except NotDoneError as error:
        why = Counter(undone.why for undone in error.undone)
        done = error.num_tasks - len(error.undone)
        return PlanLine(stage=stage.name, num_done=done, num_undone=len(error.undone), why=dict(why))
    return PlanLine(stage=stage.name, num_done=num_tasks, num_undone=0, why={})


def _plan_shards(ledger: Ledger, group: Sequence[ShardStage]) -> list[PlanLine]:
    done: Counter[str] = Counter()
    why: dict[str, Counter[str]] = {stage.name: Counter() for stage in group}
    for stage in group:
        ledger.place(stage)
    for shard in ledger.shards("pool", "query", "benchmark"):
        role = ledger.roles()[shard // 1_000_000]
        waits = False
        for stage in group:
            if role not in stage.roles:
                continue
            if waits:
                why[stage.name]["follows"] += 1
                continue
            try:
                undone = ledger.undone_shard(stage, shard)
            except LookupError:  # a dry run registers nothing, so the lines of a new shard are not there
                why[stage.name]["missing"] += 1
                waits = True
                continue
            done[stage.name] += undone is None
            if undone is not None:
                why[stage.name][undone.why] += 1
                waits = True
    return [
        PlanLine(stage=s.name, num_done=done[s.name], num_undone=sum(why[s.name].values()), why=dict(why[s.name]))
        for s in group
    ]


def _unseen(ledger: Ledger, stage: Stage) -> PlanLine:
    """A stage behind one that is not done: only changed settings can be seen."""
    why: Counter[str] = Counter()
    for table in stage.writes:
        for path in ledger.stores[TABLES[table].root].list(table) if TABLES[table].root == "run" else ():
            if not path.endswith(".parquet"):
                continue
            part = Part("run", table, int(path.rsplit("-", 1)[1].removesuffix(".parquet")))
            footer = ledger.footer(part)
            if footer is not None and footer.inputs.get("config") != stage.fingerprint_values():
                key = ledger.changed_config(stage, footer)
                why[f"stale: {key}"] += 1
        break
    return PlanLine(stage=stage.name, num_done=0, num_undone=sum(why.values()), why=dict(why), known=False)


def _walk(ledger: Ledger, stage: GlobalStage, do: Callable[[list[Job]], None] | None) -> list[Part]:
    """Run a stage's own planning; what is not done is done by ``do``, or stops the walk. All parts it writes."""
    written: list[Part] = []

    def map_tasks(tasks: Sequence[Task]) -> None:
        undone = [found for task in tasks if (found := ledger.undone_task(stage, task)) is not None]
        if undone and do is None:
            raise NotDoneError(undone, len(tasks))
        if undone and do is not None:
            do([found.job for found in undone])
        written.extend(part for task in tasks for part in (task.writes, *task.also))
        note()

    def note() -> None:
        for table in {table_of(part) for part in written}:
            there = (part.index for part in written if table_of(part) == table and ledger.footer(part) is not None)
            ledger.task_parts[table] = tuple(sorted(there))

    stage.run(ledger, map_tasks)
    note()  # without what the stage has discarded
    return written


class Driver:
    """Has the stages done, through an executor that is made when there is work."""

    def __init__(
        self,
        ledger: Ledger,
        stages: Sequence[Stage],
        make_executor: Callable[[], Executor],
        say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._stages = stages
        self._make_executor = make_executor
        self._executor: Executor | None = None
        self._say = say
        self._check = check  # raises when another driver has taken over
        self.summary = Summary()
        self._num_done: Counter[str] = Counter()
        self._said_at = time.monotonic()

    def run(self) -> Summary:
        """Go through all stages."""
        try:
            for group in groups(self._stages):
                if isinstance(group[0], GlobalStage):
                    self._run_global(group[0])
                else:
                    self._run_shards([stage for stage in group if isinstance(stage, ShardStage)])
        finally:
            if self._executor is not None:
                self._executor.close()
        return self.summary

    def _run_global(self, stage: GlobalStage) -> None:
        started = time.monotonic()
        self._ledger.place(stage)
        written = _walk(self._ledger, stage, do=lambda jobs: self._scheduler().run(jobs))
        self._remove_others(stage, written)
        self._say_stages([stage], started)
        if stage.name in self.summary.costs:
            for line in stage.told(self._ledger):
                self._say(line)

    def _run_shards(self, group: Sequence[ShardStage]) -> None:
        started = time.monotonic()
        ledger = self._ledger
        for stage in group:
            ledger.place(stage)
            self._guard(stage)
        chains = {
            shard: [stage for stage in group if ledger.roles()[shard // 1_000_000] in stage.roles]
            for shard in ledger.shards("pool", "query", "benchmark")
        }

        def next_of(shard: int) -> Iterator[Job]:
            while chains[shard]:
                undone = ledger.undone_shard(chains[shard].pop(0), shard)
                if undone is not None:
                    yield undone.job
                    return

        first = [job for shard in chains for job in next_of(shard)]
        if first:
            self._scheduler().run(first, follow=lambda job: next_of(job.shard))
        for stage in group:
            shards = ledger.shards(*stage.roles)
            self._remove_others(stage, [ledger.part(table, shard) for table in stage.writes for shard in shards])
        self._say_stages(group, started)

    def _guard(self, stage: ShardStage) -> None:
        """Refuse to make many facts again unasked."""
        if stage.kind != "facts" or stage.name in self._ledger.redo:
            return
        stale = self._ledger.stale_rows(stage, self._stale_candidates(stage))
        elsewhere = self._ledger.rows_elsewhere(stage)
        if stale + elsewhere > (0 if stage.name == "fetch" else REDO_ROWS):
            seen = (self._seen(stage, shard) for shard in self._stale_candidates(stage))
            why = next(filter(None, seen), "another model or other settings than in the last command")
            raise ConfigError(
                f"{stage.name}: {stale + elsewhere:,} rows that were made before would be made again ({why}); "
                f"say so with --redo {stage.name}, undo the change, or use another pool"
            )

    def _stale_candidates(self, stage: ShardStage) -> list[int]:
        """Shards whose inputs are there already: only these can have been made before."""
        found = []
        for shard in self._ledger.shards(*stage.roles):
            if self._ledger.footer(self._ledger.part(stage.writes[0], shard)) is not None:
                found.append(shard)
        return found

    def _seen(self, stage: ShardStage, shard: int) -> str | None:
        undone = self._ledger.undone_shard(stage, shard)
        return undone.why if undone is not None and undone.why.startswith("stale") else None

    def _scheduler(self) -> Scheduler:
        if self._executor is None:
            self._executor = self._make_executor()
        return Scheduler(self._executor, {stage.name: stage.resources for stage in self._stages}, self._note)

    def _note(self, job: Job, done: Done) -> None:
        self._ledger.committed(done.footers)
        cost = self.summary.costs.setdefault(job.stage, StageCost())
        cost.num_jobs += 1
        cost.num_rows += done.num_rows
        cost.wall_s += done.wall_s
        cost.cpu_s += done.cpu_s
        self.summary.peaks[done.pid] = max(done.peak_bytes, self.summary.peaks.get(done.pid, 0))
        if time.monotonic() - self._said_at > 10.0:
            self._said_at = time.monotonic()
            self._say(f"  {job.stage:<16} {cost.num_jobs:>5} jobs {cost.num_rows:>9,} rows so far")

    def _say_stages(self, group: Sequence[Stage], started: float) -> None:
        """What the stages of a group did, and how long they took together."""
        did = [stage for stage in group if stage.name in self.summary.costs]
        for stage in did:
            cost = self.summary.costs[stage.name]
            wall = f"   {time.monotonic() - started:>5.0f} s" if stage is did[-1] else ""
            line = f"  {stage.name:<16} {cost.num_jobs:>5} jobs {cost.num_rows:>9,} rows {cost.cpu_s:>8.1f} CPU s{wall}"
            self._say(line)

    def _remove_others(self, stage: Stage, written: Sequence[Part]) -> None:
        """Parts of an earlier state of the recipe: tasks that are no longer cut, shards of a source that left."""
        self._check()
        keep = {part.path for part in written}
        for table in stage.writes:
            if TABLES[table].root != "run":
                continue
            for path in list(self._ledger.stores["run"].list(table)):
                if path not in keep and path.endswith(".parquet"):
                    self._ledger.stores["run"].delete(path)
                    index = int(path.rsplit("-", 1)[1].removesuffix(".parquet"))
                    self._ledger.forget(Part("run", table, index))
