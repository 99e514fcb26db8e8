"""Where jobs run: in this process, or in worker actors of a Ray cluster. The only file that knows Ray.

One loop serves both. A job that fails is run again; a worker that dies is replaced and its job run again; a job that
lasts far longer than its like is run twice (never one that visits other people's servers). A stage whose jobs keep
failing stops the run, and so does an outage of what it needs from outside, at once.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from curation.lease import LeaseLostError
from curation.stage import Resources
from pipelines.scratch import sweep_scratch
from pipelines.work import Done, Job, Where, execute, kind_of
from training.config import ConfigError

TRIES_PER_JOB = 3
DEATHS_PER_JOB = 3
FAILED_JOBS_PER_STAGE = 3
STRAGGLER_FACTOR = 4.0
STRAGGLER_S = 60.0


class StageFailedError(RuntimeError):
    """Jobs of a stage kept failing: what was done stays, the same command goes on from there."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job did not end."""

    kind: str  # config | outage | lease | task | death
    message: str
    trace: str = ""


class Executor(Protocol):
    """A place where jobs run."""

    def free(self, resources: Resources) -> int:
        """How many jobs with these needs could start now."""

    def submit(self, job: Job, resources: Resources) -> int:
        """Start a job; its ticket."""

    def wait(self, timeout_s: float) -> list[tuple[int, Done | Failure]]:
        """Tickets that ended, maybe none."""

    def close(self) -> None:
        """End all workers."""


def run_job(job: Job, where: Where) -> Done | Failure:
    """Run a job; an error comes back as a value."""
    try:
        return execute(job, where)
    except Exception as error:
        trace = traceback.format_exc()
        return Failure(kind=kind_of(error), message=f"{type(error).__name__}: {error}", trace=trace)


class InlineExecutor:
    """Jobs one after another in this process."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._queue: deque[tuple[int, Job]] = deque()
        self._ticket = 0

    def free(self, resources: Resources) -> int:
        """One job at a time."""
        del resources
        return 0 if self._queue else 1

    def submit(self, job: Job, resources: Resources) -> int:
        """Queue a job; ``wait`` runs it."""
        del resources
        self._ticket += 1
        self._queue.append((self._ticket, job))
        return self._ticket

    def wait(self, timeout_s: float) -> list[tuple[int, Done | Failure]]:
        """Run the queued job."""
        del timeout_s
        if not self._queue:
            return []
        ticket, job = self._queue.popleft()
        return [(ticket, run_job(job, self._where))]

    def close(self) -> None:
        """Nothing to end."""


class RayExecutor:
    """Jobs in worker actors: one pool that computes, one that waits on the network, one with a GPU each.

    All CPU workers together hold at most the CPUs of the cluster less one, which the driver and Ray itself need.
    """

    def __init__(self, where: Where, *, workers: int | None, fetchers: int, gpu_workers: int | None) -> None:
        import ray

        self._ray = ray
        self._started_here = not ray.is_initialized()
        if self._started_here:
            address = os.environ.get("RAY_ADDRESS", "local")
            os.environ.setdefault("RAY_AUTH_MODE", "disabled" if address == "local" else "token")
            ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}},
            )
        total = ray.cluster_resources()
        cpus = max(1, int(total.get("CPU", 1)))
        num_cpu = workers if workers is not None else cpus
        gpus = int(total.get("GPU", 0))
        self._sizes = {"cpu": num_cpu, "io": fetchers, "gpu": gpu_workers if gpu_workers is not None else gpus}
        held = {"cpu": min(1.0, int(1000 * (cpus - 1) / num_cpu) / 1000), "io": 0.0, "gpu": 0.0}
        self._options = {
            "cpu": {"num_cpus": held["cpu"]},
            "io": {"num_cpus": held["io"]},
            "gpu": {"num_cpus": held["gpu"], "num_gpus": 1},
        }
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(_Worker)
        self._where = ray.put(where)
        self._idle: dict[str, list[Any]] = {"cpu": [], "io": [], "gpu": []}
        self._num: Counter[str] = Counter()
        self._running: dict[Any, tuple[int, str, Any]] = {}
        self._ticket = 0

    def free(self, resources: Resources) -> int:
        """Idle workers and workers that may still be started."""
        pool = _pool(resources)
        return self._sizes[pool] - self._num[pool] + len(self._idle[pool])

    def submit(self, job: Job, resources: Resources) -> int:
        """Give a job to an idle worker, or to a new one."""
        pool = _pool(resources)
        if self._idle[pool]:
            worker = self._idle[pool].pop()
        else:
            worker = self._actor.options(**self._options[pool]).remote(self._where)
            self._num[pool] += 1
        self._ticket += 1
        self._running[worker.run.remote(job)] = (self._ticket, pool, worker)
        return self._ticket

    def wait(self, timeout_s: float) -> list[tuple[int, Done | Failure]]:
        """Results of workers; a worker that died is a failure of its job, and is gone."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        ended: list[tuple[int, Done | Failure]] = []
        for reference in ready:
            ticket, pool, worker = self._running.pop(reference)
            try:
                outcome = self._ray.get(reference)
                self._idle[pool].append(worker)
            except self._ray.exceptions.RayError as error:
                outcome = Failure(kind="death", message=f"its worker died ({type(error).__name__})")
                self._num[pool] -= 1
                self._fit_to_nodes()
            ended.append((ticket, outcome))
        return ended

    def _fit_to_nodes(self) -> None:
        """A lost node takes its places along: a worker that fits nowhere would keep its job waiting for ever."""
        held = float(self._options["cpu"]["num_cpus"])
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if held > 0:
            places = sum(int(node.get("CPU", 0) / held + 1e-6) for node in nodes)
            self._sizes["cpu"] = max(1, min(self._sizes["cpu"], places))
        self._sizes["gpu"] = min(self._sizes["gpu"], int(sum(node.get("GPU", 0) for node in nodes)))

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        for pool in self._idle.values():
            for worker in pool:
                self._ray.kill(worker)
        for _, _, worker in self._running.values():
            self._ray.kill(worker)
        if self._started_here:
            self._ray.shutdown()


class _Worker:
    """Actor: runs any job of any stage."""

    def __init__(self, where: Where) -> None:
        self._where = where
        import faulthandler

        faulthandler.enable()
        sweep_scratch()  # of a worker of this machine that was killed

    def run(self, job: Job) -> Done | Failure:
        return run_job(job, self._where)


def _pool(resources: Resources) -> str:
    if resources.gpus > 0:
        return "gpu"
    return "cpu" if resources.cpus > 0 else "io"


@dataclass(kw_only=True)
class _Entry:
    job: Job
    started: float = 0.0
    tries: int = 0
    deaths: int = 0
    tickets: set[int] = field(default_factory=set)


class Scheduler:
    """Runs jobs and those that follow from them, until none is left."""

    def __init__(
        self,
        executor: Executor,
        resources: Mapping[str, Resources],
        note: Callable[[Job, Done], None],
    ) -> None:
        self._executor = executor
        self._resources = resources  # of each stage
        self._note = note
        self._failed: Counter[str] = Counter()
        self._lasted: dict[str, list[float]] = {}
        self._waiting: deque[_Entry] = deque()
        self._running: dict[int, _Entry] = {}

    def run(self, jobs: Iterable[Job], follow: Callable[[Job], Iterable[Job]] = lambda job: ()) -> None:
        """Run all jobs; ``follow`` names those that a finished job makes possible."""
        self._waiting.extend(_Entry(job=job) for job in jobs)
        while self._waiting or self._running:
            self._start()
            if self._waiting and not self._running:
                stage = self._waiting[0].job.stage
                raise ConfigError(f"{stage} needs a GPU and the cluster has none; set execution.device=cpu")
            self._start_twice()
            for ticket, outcome in self._executor.wait(timeout_s=1.0):
                entry = self._running.pop(ticket, None)
                if entry is None or ticket not in entry.tickets:
                    continue  # the other of two won
                entry.tickets.discard(ticket)
                if isinstance(outcome, Failure):
                    if not entry.tickets:
                        self._again(entry, outcome)
                    continue
                for other in entry.tickets:
                    self._running.pop(other, None)
                entry.tickets.clear()
                self._lasted.setdefault(entry.job.stage, []).append(time.monotonic() - entry.started)
                self._note(entry.job, outcome)
                self._waiting.extendleft(_Entry(job=job) for job in follow(entry.job))

    def _start(self) -> None:
        """Give jobs to whoever is free, in order; a stage that finds nobody free is not asked again in this turn."""
        kept: list[_Entry] = []
        full: set[str] = set()
        stages = {entry.job.stage for entry in self._waiting} if len(self._waiting) < 100 else set(self._resources)
        while self._waiting and len(full) < len(stages):
            entry = self._waiting.popleft()
            stage, needs = entry.job.stage, self._resources[entry.job.stage]
            if stage not in full and self._executor.free(needs) > 0 and self._below_limit(stage, needs):
                entry.started = time.monotonic()
                self._submit(entry, needs)
            else:
                full.add(stage)
                kept.append(entry)
        self._waiting.extendleft(reversed(kept))

    def _submit(self, entry: _Entry, needs: Resources) -> None:
        ticket = self._executor.submit(entry.job, needs)
        entry.tickets.add(ticket)
        self._running[ticket] = entry

    def _below_limit(self, stage: str, needs: Resources) -> bool:
        running = sum(entry.job.stage == stage for entry in self._running.values())
        return needs.max_tasks is None or running < needs.max_tasks

    def _start_twice(self) -> None:
        if self._waiting:
            return
        for entry in list(self._running.values()):
            needs = self._resources[entry.job.stage]
            lasted = self._lasted.get(entry.job.stage, [])
            if not needs.speculative or len(entry.tickets) > 1 or len(lasted) < 3 or self._executor.free(needs) < 1:
                continue
            if time.monotonic() - entry.started > max(STRAGGLER_S, STRAGGLER_FACTOR * statistics.median(lasted)):
                self._submit(entry, needs)

    def _again(self, entry: _Entry, failure: Failure) -> None:
        """Queue a failed job again, or stop."""
        if failure.kind == "config":
            raise ConfigError(failure.message.removeprefix("ConfigError: "))
        if failure.kind == "lease":
            raise LeaseLostError(failure.message)
        if failure.kind == "outage":
            raise StageFailedError(f"{entry.job.label}: {failure.message.removeprefix('OutageError: ')}")
        entry.deaths += failure.kind == "death"
        entry.tries += failure.kind != "death"
        print(f"  {entry.job.label}: {failure.message}; trying again", file=sys.stderr, flush=True)
        if entry.tries >= TRIES_PER_JOB or entry.deaths >= DEATHS_PER_JOB:
            raise StageFailedError(
                f"{entry.job.label} failed {entry.tries + entry.deaths} times, last: {failure.message}\n{failure.trace}"
            )
        self._failed[entry.job.stage] += failure.kind != "death"
        if self._failed[entry.job.stage] > FAILED_JOBS_PER_STAGE * TRIES_PER_JOB:
            raise StageFailedError(f"jobs of {entry.job.stage} keep failing, last: {failure.message}\n{failure.trace}")
        self._waiting.append(entry)
