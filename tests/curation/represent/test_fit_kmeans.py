"""The fit over tasks: the same bytes as a fit in memory, however it is cut, killed or spread over workers."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.represent import fit_kmeans, kmeans
from curation.represent.cluster import ClusterConfig
from curation.represent.fit_kmeans import FitKmeans
from curation.schema import TABLES, UNDER_WAY, Part, first_shard, image_ids, vector_schema
from curation.store import open_store, read_part, write_part
from pipelines.curate import CurateRecipe
from pipelines.drive import Driver, Summary, plan
from pipelines.plan import Ledger
from pipelines.runner import Executor, InlineExecutor, RayExecutor
from pipelines.work import Where
from training.config import ConfigError

CONFIG = {"num_clusters": 12, "iterations": 4, "sample": 330}
SHARDS, ROWS, DIM = 5, 80, 16


def stored(rng: np.random.Generator, num: int) -> np.ndarray:
    values = rng.normal(size=(num, DIM))
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float16)


class Killed(InlineExecutor):
    """Dies before the job of a number."""

    def __init__(self, where: Where, last: int) -> None:
        super().__init__(where)
        self._left = last

    def submit(self, job, resources):
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return super().submit(job, resources)


class Pool:
    """Embeddings of some shards in a folder, and the stage run on them as a command does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        self.ids, self.vectors, self.sha256 = np.zeros(0, np.int64), np.zeros((0, DIM), np.float16), []
        for shard in range(SHARDS):
            ids, vectors = image_ids(first_shard(0) + shard, ROWS), stored(rng, ROWS)
            self.put(shard, ids, vectors)
            self.ids, self.vectors = np.append(self.ids, ids), np.concatenate([self.vectors, vectors])
            self.sha256 += map(self.sha256_of, ids.tolist())

    @staticmethod
    def sha256_of(image_id: int) -> str:
        return hashlib.sha256(str(image_id).encode()).hexdigest()

    def put(self, shard: int, ids: np.ndarray, vectors: np.ndarray) -> None:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
        sha256 = pa.array(list(map(self.sha256_of, ids.tolist())))
        store, part = open_store(f"{self.folder}/pool"), Part("pool", "embeddings", first_shard(0) + shard)
        path = self.folder / "written"
        self.folder.mkdir(exist_ok=True)
        table = pa.table([pa.array(ids), sha256, column], schema=vector_schema(DIM))
        write_part(table, path, stage="embed", version=1, fingerprint="f", inputs={})
        store.replace(part.path, path, store.tag(part.path))

    def driver(self, executor=InlineExecutor, *, memory_mb: float = 1500, redo=frozenset(), **config) -> Driver:
        recipe = CurateRecipe.model_validate(
            {
                "name": "made",
                "pool": f"{self.folder}/pool",
                "run": f"{self.folder}/run",
                "sources": {"web": {"kind": "folder", "location": "somewhere"}},
                "cluster": CONFIG | config,
            }
        )
        row = {"source_id": 0, "name": "web", "role": "pool", "num_shards": SHARDS}
        stages = [FitKmeans(recipe.cluster)]
        self.ledger = Ledger(
            stores={root: open_store(f"{self.folder}/{root}") for root in ("pool", "run")},
            stages=stages,
            registered=pa.Table.from_pylist([row], schema=TABLES["sources"].schema),
            source_ids={"web": 0},
            redo=redo,
        )
        where = Where(
            pool=recipe.pool,
            run=recipe.run,
            pool_token="",
            run_token="",
            recipe=recipe.model_dump_json(),
            roles={0: "pool"},
            memory_bytes=int(memory_mb * 1e6),
        )
        return Driver(self.ledger, stages, lambda: executor(where), lambda line: None)

    def fit(self, executor=InlineExecutor, **options) -> Summary:
        return self.driver(executor, **options).run()

    def made(self) -> np.ndarray:
        part = self.ledger.part("fit_kmeans", 0)
        table = read_part(open_store(f"{self.folder}/pool"), part)
        assert table["cluster"].to_pylist() == list(range(len(table)))
        return np.array(table["vector"].to_pylist(), np.float32)

    def under_way(self) -> list[str]:
        return [path for table in UNDER_WAY for path in open_store(f"{self.folder}/run").list(table)]

    def wanted(self, **config) -> np.ndarray:
        """The same fit in memory: the sample are the least sha256 of the first shards that hold it."""
        asked = ClusterConfig(**(CONFIG | config))
        num = next((n for n in range(ROWS, len(self.ids), ROWS) if n >= asked.sample), len(self.ids))
        rows = np.sort(sorted(range(num), key=lambda row: self.sha256[row])[: asked.sample])
        return kmeans.fit(
            self.vectors[rows], num_clusters=asked.num_clusters, iterations=asked.iterations, seed=asked.seed
        )


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_kmeans, "AT_ONCE", 0)
    monkeypatch.setattr(fit_kmeans, "piece_rows", lambda num_clusters: 100)


@pytest.mark.parametrize("rows", [10_000, 329, 100, 37])
@pytest.mark.parametrize("config", [{}, {"sample": 100}, {"num_clusters": 50, "seed": 3}, {"num_clusters": 400}])
def test_however_it_is_cut_it_is_the_fit_in_memory(pool, monkeypatch, rows, config):
    monkeypatch.setattr(fit_kmeans, "AT_ONCE", rows)
    monkeypatch.setattr(fit_kmeans, "piece_rows", lambda num_clusters: rows)
    num_jobs = pool.fit(**config).num_jobs
    assert pool.made().tobytes() == pool.wanted(**config).tobytes()
    assert pool.under_way() == []
    # pieces, starts and the first centroids, so many iterations of sums and centroids, the last one
    most = 1 + -(-330 // rows) + 1 + 4 * (-(-330 // rows) + 1) + 1
    assert (num_jobs == 1) if rows >= (160 if config.get("sample") else 400) else 1 < num_jobs <= most
    assert pool.fit(**config).num_jobs == 0


def test_a_piece_without_a_start(pool, monkeypatch):
    """One cluster starts from 32 pictures of 330: some of 33 pieces have none of them."""
    monkeypatch.setattr(fit_kmeans, "AT_ONCE", 0)
    monkeypatch.setattr(fit_kmeans, "piece_rows", lambda num_clusters: 10)
    pool.fit(num_clusters=1)
    assert pool.made().tobytes() == pool.wanted(num_clusters=1).tobytes()


def test_blocks_of_centroids_change_no_byte(pool, small_pieces, monkeypatch):
    """A task with little memory moves some clusters at a time."""
    read, real = set(), fit_kmeans._rows

    def rows(column, dim, kind):
        if kind is np.float64:
            read.add(len(column))
        return real(column, dim, kind)

    monkeypatch.setattr(fit_kmeans, "_rows", rows)
    monkeypatch.setattr(fit_kmeans, "_SPARE_BYTES", 0)
    pool.fit(memory_mb=0.005)
    assert read <= {1, 2, 3, 4}
    assert pool.made().tobytes() == pool.wanted().tobytes()


def test_killed_anywhere_it_goes_on_and_does_nothing_twice(pool, small_pieces, tmp_path):
    whole = pool.fit().num_jobs
    wanted = pool.made().tobytes()
    for last in range(whole):
        again = Pool(tmp_path / f"killed-{last}")
        with pytest.raises(KeyboardInterrupt):
            again.fit(lambda where, last=last: Killed(where, last))
        assert again.fit().num_jobs == whole - last
        assert again.made().tobytes() == wanted
        assert again.under_way() == []


def test_a_dry_run_in_the_middle_removes_nothing(pool, small_pieces):
    with pytest.raises(KeyboardInterrupt):
        pool.fit(lambda where: Killed(where, 12))
    before = pool.under_way()
    assert before
    line = plan(pool.driver()._ledger, pool.ledger.stages)[0]
    assert line.num_undone > 0
    assert pool.under_way() == before


def test_a_fit_is_kept_and_made_anew_when_asked(pool, small_pieces):
    num_jobs = pool.fit().num_jobs
    before = pool.made().tobytes()
    pool.put(0, pool.ids[:ROWS], stored(np.random.default_rng(9), ROWS))
    assert pool.fit().num_jobs == 0
    assert pool.fit(redo=frozenset({"fit_kmeans"})).num_jobs == num_jobs
    assert pool.made().tobytes() != before
    assert pool.under_way() == []


def test_a_takedown_in_between_draws_the_sample_anew(pool, small_pieces, tmp_path):
    """A cluster may be one picture: going on with its sums would put its vector into the pool again."""
    with pytest.raises(KeyboardInterrupt):
        pool.fit(lambda where: Killed(where, 12), num_clusters=300)
    pool.put(0, pool.ids[1:ROWS], pool.vectors[1:ROWS])
    rules = pa.Table.from_pylist([{"kind": "sha256", "value": pool.sha256[0]}], schema=TABLES["takedowns"].schema)
    write_part(rules, pool.folder / "written", stage="takedown", version=1, fingerprint="f", inputs={})
    open_store(f"{pool.folder}/pool").create(Part("pool", "takedowns", 0).path, pool.folder / "written")
    pool.fit(num_clusters=300)
    fresh = Pool(tmp_path / "fresh")
    fresh.put(0, pool.ids[1:ROWS], pool.vectors[1:ROWS])
    fresh.fit(num_clusters=300)
    assert pool.made().tobytes() == fresh.made().tobytes()
    assert pool.under_way() == []


def test_a_shard_of_which_nothing_is_left_is_passed_over(pool, small_pieces):
    with pytest.raises(KeyboardInterrupt):
        pool.fit(lambda where: Killed(where, 8))
    pool.put(0, pool.ids[:0], pool.vectors[:0])
    pool.fit()
    assert pool.made().shape == (12, DIM)


@pytest.mark.parametrize("changed", [{"sample": 150}, {"num_clusters": 40}, {"seed": 5}])
def test_a_killed_fit_of_other_settings_leaves_no_trace(pool, small_pieces, changed):
    with pytest.raises(KeyboardInterrupt):
        pool.fit(lambda where: Killed(where, 12))
    pool.fit(**changed)
    assert pool.made().tobytes() == pool.wanted(**changed).tobytes()
    assert pool.under_way() == []


def test_a_sample_without_a_picture_is_one_line(pool, small_pieces):
    for shard in range(SHARDS):
        pool.put(shard, pool.ids[:0], pool.vectors[:0])
    with pytest.raises(ConfigError, match="cluster: no picture of the sources is left to be clustered"):
        pool.fit()


def test_sums_that_do_not_fit_into_a_task_are_one_line_before_work(pool, small_pieces):
    with pytest.raises(ConfigError, match=r"cluster.num_clusters: 12 clusters of 16 .* take 269 MB; .* is 200"):
        pool.fit(memory_mb=200)
    assert pool.under_way() == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 2))])
def test_workers_change_no_byte(pool, small_pieces, workers):
    def ray(where: Where) -> Executor:
        return RayExecutor(where, workers=workers, fetchers=1, gpu_workers=None)

    pool.fit(ray)
    assert pool.made().tobytes() == pool.wanted().tobytes()
