"""The scheduler on an executor whose jobs end as the test says."""

from collections import deque
from pathlib import Path

import pytest

from curation.lease import LeaseLostError
from curation.schema import Part
from curation.stage import Resources
from pipelines import runner
from pipelines.runner import Failure, Scheduler, StageFailedError
from pipelines.work import Done, Job, Origin
from training.config import ConfigError


def job(stage: str, shard: int) -> Job:
    origin = Origin(stage=stage, version=1, fingerprint="f", inputs={})
    return Job(stage=stage, shard=shard, origin=origin, folders={}, parts={}, writes=(Part("run", stage, shard),))


DONE = Done(footers={}, num_rows=1, wall_s=0.1, cpu_s=0.1, peak_bytes=1, pid=1)
FAILED = Failure(kind="task", message="ValueError: no")
DIED = Failure(kind="death", message="its worker died")


class Scripted:
    """Runs up to ``size`` jobs; each ends as the next line of its script says, in order of submission."""

    def __init__(self, script: dict[tuple[str, int], list[Done | Failure | None]], size: int = 2) -> None:
        self.script = {key: deque(outcomes) for key, outcomes in script.items()}
        self.size = size
        self.running: list[tuple[int, Job]] = []
        self.started: list[tuple[str, int]] = []

    def free(self, resources: Resources) -> int:
        return self.size - len(self.running)

    def submit(self, job: Job, resources: Resources) -> int:
        self.started.append((job.stage, job.shard))
        self.running.append((len(self.started), job))
        return len(self.started)

    def wait(self, timeout_s: float) -> list[tuple[int, Done | Failure]]:
        for place, (ticket, job) in enumerate(self.running):
            outcomes = self.script.get((job.stage, job.shard), deque([DONE]))
            outcome = outcomes.popleft() if outcomes else DONE
            if outcome is not None:
                del self.running[place]
                return [(ticket, outcome)]
        return []

    def close(self) -> None:
        pass


def scheduler(executor: Scripted, **resources: Resources) -> tuple[Scheduler, list[tuple[str, int]]]:
    ended: list[tuple[str, int]] = []
    needs = {"a": Resources(), "b": Resources(), **resources}
    return Scheduler(executor, needs, lambda job, done: ended.append((job.stage, job.shard))), ended


def test_a_shard_goes_on_as_soon_as_it_can():
    executor = Scripted({})
    scheduled, ended = scheduler(executor)
    scheduled.run(
        [job("a", 1), job("a", 2), job("a", 3)], follow=lambda j: [job("b", j.shard)] if j.stage == "a" else []
    )
    assert sorted(ended) == [(stage, shard) for stage in "ab" for shard in (1, 2, 3)]
    assert executor.started.index(("b", 1)) < executor.started.index(("a", 3))


def test_a_failed_job_is_tried_three_times_and_then_named(capsys):
    scheduled, ended = scheduler(Scripted({("a", 1): [FAILED, FAILED, DONE]}))
    scheduled.run([job("a", 1)])
    assert ended == [("a", 1)]
    assert "a shard 1: ValueError: no; trying again" in capsys.readouterr().err
    scheduled, ended = scheduler(Scripted({("a", 1): [FAILED] * 3}))
    with pytest.raises(StageFailedError, match="a shard 1 failed 3 times, last: ValueError: no"):
        scheduled.run([job("a", 1)])


def test_a_dead_worker_is_no_failure_of_the_job_until_the_third():
    scheduled, ended = scheduler(Scripted({("a", 1): [DIED, FAILED, DIED, FAILED, DONE]}))
    scheduled.run([job("a", 1)])
    assert ended == [("a", 1)]
    scheduled, _ = scheduler(Scripted({("a", 1): [DIED] * 3}))
    with pytest.raises(StageFailedError, match="its worker died"):
        scheduled.run([job("a", 1)])


def test_a_stage_that_keeps_failing_stops_the_run():
    jobs = [job("a", shard) for shard in range(20)]
    scheduled, _ = scheduler(Scripted({("a", shard): [FAILED, DONE] for shard in range(20)}))
    with pytest.raises(StageFailedError, match="jobs of a keep failing"):
        scheduled.run(jobs)


def test_an_outage_stops_the_run_at_once_in_one_line(capsys):
    outage = Failure(kind="outage", message="OutageError: nobody answers; check the network", trace="Traceback")
    executor = Scripted({("a", 1): [outage]})
    scheduled, _ = scheduler(executor)
    with pytest.raises(StageFailedError) as caught:
        scheduled.run([job("a", shard) for shard in range(1, 9)])
    assert str(caught.value) == "a shard 1: nobody answers; check the network"
    assert capsys.readouterr().err == ""


def test_bad_configuration_and_a_lost_lease_are_not_tried_again():
    for kind, error in (("config", ConfigError), ("lease", LeaseLostError)):
        executor = Scripted({("a", 1): [Failure(kind=kind, message="ConfigError: this key")]})
        scheduled, _ = scheduler(executor)
        with pytest.raises(error, match="this key"):
            scheduled.run([job("a", 1)])
        assert executor.started == [("a", 1)]


def test_a_straggler_runs_twice_but_a_fetch_never(monkeypatch):
    monkeypatch.setattr(runner, "STRAGGLER_S", 0.0)
    monkeypatch.setattr(runner, "STRAGGLER_FACTOR", 0.0)
    for speculative, times in ((True, 2), (False, 1)):
        executor = Scripted({("a", 9): [None] * 30})
        scheduled, ended = scheduler(executor, a=Resources(speculative=speculative))
        scheduled.run([job("a", shard) for shard in (9, 1, 2, 3, 4)])
        assert executor.started.count(("a", 9)) == times
        assert ended.count(("a", 9)) == 1


def test_no_more_tasks_of_a_stage_at_once_than_it_allows():
    class Watching(Scripted):
        most = 0

        def submit(self, job: Job, resources: Resources) -> int:
            ticket = super().submit(job, resources)
            self.most = max(self.most, len(self.running))
            return ticket

    executor = Watching({}, size=8)
    scheduled, ended = scheduler(executor, a=Resources(max_tasks=3))
    scheduled.run([job("a", shard) for shard in range(10)])
    assert (executor.most, len(ended)) == (3, 10)


def test_only_a_few_files_start_processes():
    """Workers are started by Ray, the site and a decoder by themselves, those of a loader by torch: nothing forks."""
    users = [
        path.name
        for package in ("curation", "training", "pipelines")
        for path in (Path(__file__).resolve().parents[2] / package).rglob("*.py")
        if "import subprocess" in path.read_text() or "import multiprocessing" in path.read_text()
    ]
    assert set(users) <= {"serve.py", "build.py", "loader.py", "sandbox.py"}
