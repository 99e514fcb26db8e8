"""One small sample web for all end-to-end tests, and one undisturbed run on it that the others are held against."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.schema import Part
from curation.store import open_store, read_footer, read_part
from pipelines.curate import CurateRecipe
from pipelines.preflight import Options
from pipelines.recipe import load_recipe
from pipelines.sample_web.build import build
from pipelines.sample_web.config import SampleWebConfig
from pipelines.session import Outcome, curate

NUM_URLS = 240
SHARD_ROWS = 30  # eight shards of urls
# The SIFT of 800 pictures, as many as a fit has at least, would take a third of a run. One of fewer tells less apart.
SMALL_FIT = (
    "descriptor.fit_pictures=200",
    "descriptor.fit_at_least=200",
    "descriptor.duplicate_threshold=0.5",
    "descriptor.leakage_threshold=0.5",
)
TIMES = ("fetch_log", "state.json", "recipe.yaml", "requests.jsonl", "lease.json", "report.html", "sources.json")


class Lab:
    """Runs the smoke recipe on the small web into folders of its own."""

    def __init__(self, web: Path) -> None:
        self.web = web

    def overrides(self, folder: Path | str, *more: str) -> list[str]:
        """Values laid over the smoke recipe for a run below ``folder``."""
        return [
            f"pool={folder}/pool",
            f"run={folder}/run",
            f"shard_rows={SHARD_ROWS}",
            f"sample_web.path={self.web}",
            f"sample_web.urls={NUM_URLS}",
            f"sources.web.location={self.web}/urls.csv",
            *(f"queries.{name}.location={self.web}/queries/{name}" for name in ("as_is", "sample", "cluster")),
            f"benchmarks.benchmark.location={self.web}/benchmark",
            "fetch.timeout_s=5",  # longer than a busy machine stands still, or a row that fails does so as `timeout`
            "fetch.backoff_s=0.05",
            "fetch.per_host_interval_s=0.01",
            "look.face_input_px=[320]",  # the other sizes take five times as long and are tested elsewhere
            *SMALL_FIT,
            "cluster.num_clusters=8",
            "semdedup.eps=0.005",
            "export.samples_per_tar=20",
            "execution.executor=inline",
            "execution.min_free_gb=0.1",
            *more,
        ]

    def recipe(self, folder: Path | str, *more: str) -> CurateRecipe:
        """The resolved recipe."""
        return load_recipe(CurateRecipe, "smoke", self.overrides(folder, *more))

    def curate(
        self,
        folder: Path | str,
        *more: str,
        redo: Sequence[str] = (),
        retry: Sequence[str] = (),
        until: str | None = None,
    ) -> Outcome:
        """Run in this process."""
        options = Options(redo=tuple(redo), retry=tuple(retry), until=until)
        return curate(self.recipe(folder, *more), options, lambda text: None)

    def start(self, folder: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        """Start the command in a process group of its own."""
        command = [sys.executable, "-m", "pipelines.cli", "curate", "smoke", *self.overrides(folder, *more)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", **(environment or {})},
        )

    def finish(self, folder: Path, *more: str, environment: dict[str, str] | None = None) -> str:
        """Run the command to its end; its output."""
        process = self.start(folder, *more, environment=environment)
        output, _ = process.communicate(timeout=280)
        # 1: a check or the score may be short on so few urls; what matters here is that the run is whole.
        assert process.returncode in (0, 1), output
        assert "manifest" in output, output
        return output

    @staticmethod
    def digests(folder: Path | str, *roots: str) -> dict[str, str]:
        """sha256 of every file of the roots, those that hold times apart."""
        found = {}
        for root in roots or ("pool", "run"):
            for path in sorted((Path(folder) / root).rglob("*")):
                if path.is_file() and not any(part in TIMES for part in path.relative_to(folder).parts):
                    found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    @classmethod
    def assert_same(cls, folder: Path, other: Path) -> None:
        """No file of two runs differs, those that hold times apart; else the rows that do are named."""
        found, expected = cls.digests(folder), cls.digests(other)
        differing = sorted(path for path in found | expected if found.get(path) != expected.get(path))
        assert not differing, "\n".join(line for path in differing for line in _differences(folder, other, path))

    @staticmethod
    def contents(folder: Path) -> dict[str, str]:
        """Digest of what each part and tar of a run holds, whatever history made it."""
        store = open_store(f"{folder}/run")
        found = {path: Path(path).stem.split("-")[-1] for path in store.list("tars")}
        for path in store.list(""):
            if path.endswith(".parquet"):
                table, _, name = path.rpartition("/")
                part = Part("run", table, int(name[5:14]))
                found[path] = read_footer(store, part).digest
                if table in ("export_rows", "export_plan"):  # they say where bytes lie, and that is history
                    rows = read_part(store, part).drop_columns(["object", "object_offset"])
                    found[path] = hashlib.sha256(str(rows.to_pydict()).encode()).hexdigest()
        return found

    @staticmethod
    def copy(source: Path, target: Path, *, without: Sequence[str] = ()) -> Path:
        """A copy by hard links: files are swapped, never written into."""
        shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
        for folder in without:
            shutil.rmtree(target / folder, ignore_errors=True)
        return target

    @staticmethod
    def kill_group(process: subprocess.Popen) -> None:
        """SIGKILL the driver and everything it started, by process id."""
        import psutil

        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    @staticmethod
    def wait_until(condition, *, timeout_s: float = 120.0) -> None:
        """Wait for something that another process does."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError("no progress")
            time.sleep(0.05)


def _differences(folder: Path, other: Path, path: str) -> list[str]:
    """Lines that say in which rows one file of two runs differs."""
    if not path.endswith(".parquet") or not all((root / path).exists() for root in (folder, other)):
        return [path]
    tables = [pq.read_table(root / path).to_pylist() for root in (folder, other)]
    changes = [
        (number, {name: (row[name], wanted[name]) for name in row if row[name] != wanted[name]})
        for number, (row, wanted) in enumerate(zip(*tables, strict=False))
    ]
    lines = [f"{path}: row {number}, found and expected: {change}" for number, change in changes if change]
    return lines or [f"{path}: {len(tables[0])} and {len(tables[1])} rows, or the footer"]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    web = tmp_path_factory.mktemp("web") / "site"
    build(SampleWebConfig(path=str(web), urls=NUM_URLS))
    return Lab(web)


@pytest.fixture(scope="session")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pool and run of one run in process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = lab.curate(folder)
    assert outcome.summary.num_jobs > 0
    return folder
