"""A made store: pool, query sets and clusters as tables, and the stages of retrieval run on it as a command does."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.schema import TABLES, Part, first_shard, image_ids, shard_of, vector_schema
from curation.store import open_store, read_part, write_part
from pipelines.curate import CurateRecipe, build_stages
from pipelines.drive import Driver, Summary
from pipelines.plan import Ledger
from pipelines.runner import InlineExecutor
from pipelines.work import Where

STAGES = (
    "leaks", "fit_hierarchy", "semantic_duplicates", "semantic", "queries", "quotas", "candidates", "neighbours",
    "offers", "selection",
)  # fmt: skip


def sha256_of(image_id: int) -> str:
    return hashlib.sha256(str(image_id).encode()).hexdigest()


@dataclass(repr=False)
class Made:
    """A pool of unit vectors with their clusters, and query sets; pictures are rows, nothing is decoded."""

    folder: Path
    centroids: np.ndarray  # float16 [K, D]
    sets: dict[str, dict[str, Any]]  # of the recipe
    shards: dict[str, list[int]] = field(default_factory=dict)  # of each source
    vectors: dict[int, np.ndarray] = field(default_factory=dict)  # image_id -> float16 [D], of what is kept
    cluster: dict[int, int] = field(default_factory=dict)
    edges: list[dict[str, Any]] = field(default_factory=list)  # to benchmarks, rows of reference_edges
    said: list[str] = field(default_factory=list)

    def add(self, name: str, vectors: Sequence[np.ndarray], cluster: Sequence[Sequence[int]] | None = None) -> None:
        """Register a source: its vectors shard by shard, [N, D] each, and their clusters, by default the nearest."""
        role = "pool" if name == "web" else "query"
        source = len(self.shards)
        self.shards[name] = [first_shard(source) + n for n in range(len(vectors))]
        for n, (shard, stored) in enumerate(zip(self.shards[name], vectors, strict=True)):
            ids = image_ids(shard, len(stored))
            scores = stored.astype(np.float64) @ self.centroids.astype(np.float64).T
            mine = scores.argmax(axis=1) if cluster is None else np.asarray(cluster[n])
            self._write_shard(shard, role, ids, stored, mine)
            self.vectors |= dict(zip(ids.tolist(), stored, strict=True))
            self.cluster |= dict(zip(ids.tolist(), mine.tolist(), strict=True))

    def _write_shard(self, shard: int, role: str, ids: np.ndarray, vectors: np.ndarray, cluster: np.ndarray) -> None:
        sha256 = [sha256_of(one) for one in ids.tolist()]
        verdict = [{"image_id": i, "sha256": s, "keep": True} for i, s in zip(ids.tolist(), sha256, strict=True)]
        self.put("leakage" if role == "pool" else "safety", shard, verdict)
        near = (vectors.astype(np.float64) * self.centroids[cluster].astype(np.float64)).sum(axis=1)
        columns = [pa.array(ids), pa.array(cluster.astype(np.int32)), pa.array(near.astype(np.float32))]
        self.put("clusters", shard, pa.table(columns, schema=TABLES["clusters"].schema))
        dim = vectors.shape[1]
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), dim)
        self.put("embeddings", shard, pa.table([pa.array(ids), pa.array(sha256), column], schema=vector_schema(dim)))
        self.put("urls", shard, [{"image_id": int(one), "label": f"class {one % 3}"} for one in ids])

    def put(self, name: str, index: int, rows: Any) -> None:
        table = pa.Table.from_pylist(rows, schema=TABLES[name].schema) if isinstance(rows, list) else rows
        store = open_store(f"{self.folder}/{TABLES[name].root}")
        part = Part(TABLES[name].root, name, index)
        path = self.folder / "written"
        write_part(table, path, stage=name, version=1, fingerprint=name, inputs={})
        store.replace(part.path, path, store.tag(part.path))

    def recipe(self, **sections: Any) -> CurateRecipe:
        values = {"name": "made", "pool": f"{self.folder}/pool", "run": f"{self.folder}/run"}
        source = {"kind": "folder", "location": "somewhere"}
        sets = {name: ({} if one["mode"] == "balanced" else source) | one for name, one in self.sets.items()}
        return CurateRecipe.model_validate({**values, "sources": {"web": source}, "queries": sets, **sections})

    def run(self, *, memory_mb: float = 1500, **sections: Any) -> Summary:
        """All stages of retrieval, through the driver of ``lvd curate``."""
        recipe = self.recipe(**sections)
        rows = [
            {"source_id": n, "name": name, "role": "pool" if name == "web" else "query", "num_shards": len(shards)}
            for n, (name, shards) in enumerate(self.shards.items())
        ]
        self.put("sources", 0, rows)
        vectors = [row.tolist() for row in self.centroids.astype(np.float32)]
        self.put("fit_kmeans", 0, [{"cluster": n, "vector": vector} for n, vector in enumerate(vectors)])
        self.put("reference_edges", 0, self.edges)
        self.put("components", 0, [])
        stages = [stage for stage in build_stages(recipe) if stage.name in STAGES]
        self.ledger = Ledger(
            stores={root: open_store(f"{self.folder}/{root}") for root in ("pool", "run")},
            stages=stages,
            registered=pa.Table.from_pylist(rows, schema=TABLES["sources"].schema),
            source_ids={row["name"]: row["source_id"] for row in rows},
            task_parts={"reference_edges": (0,)},
        )
        where = Where(
            pool=recipe.pool,
            run=recipe.run,
            pool_token="",
            run_token="",
            recipe=recipe.model_dump_json(),
            roles=self.ledger.roles(),
            memory_bytes=int(memory_mb * 1e6),
        )
        return Driver(self.ledger, stages, lambda: InlineExecutor(where), self.said.append).run()

    def parts(self, name: str) -> dict[int, pa.Table]:
        """Parts of a table that the last run wrote, by index."""
        store = open_store(f"{self.folder}/{TABLES[name].root}")
        folder = self.ledger.folders.get(name, name)
        indices = [int(path[-17:-8]) for path in store.list(folder) if path.endswith(".parquet")]
        return {index: read_part(store, Part(TABLES[name].root, folder, index)) for index in sorted(indices)}

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [row for table in self.parts(name).values() for row in table.to_pylist()]

    def digests(self, name: str) -> Mapping[int, str]:
        return {index: self.ledger.digest(self.ledger.part(name, index)) for index in self.parts(name)}

    def ids(self, name: str) -> list[int]:
        """Pictures of a source."""
        return [one for one in self.vectors if shard_of(one) in self.shards[name]]


def unit(rng: np.random.Generator, num: int, dim: int) -> np.ndarray:
    """Unit vectors, float16 [num, dim]."""
    values = rng.normal(size=(num, dim))
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float16)


@pytest.fixture(scope="session")
def made_store() -> type[Made]:
    """The class itself, for stores of other sizes."""
    return Made


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Three pool shards of 60, three query sets of 24 in two shards each; 10 clusters, 30 equal pool pictures."""
    rng = np.random.default_rng(0)
    sets = {
        "owned": {"mode": "as_is"},
        "near": {"mode": "sample", "k": 5},
        "filled": {"mode": "cluster", "min_queries": 2, "per_cluster": 9, "cap": 20},
        "even": {"mode": "balanced", "total": 50},
    }
    made = Made(tmp_path, unit(rng, 10, 16), sets)
    pool = [unit(rng, 60, 16) for _ in range(3)]
    pool[1][10:40] = pool[1][10]  # only ties tell them apart
    made.add("web", pool)
    for name in ("owned", "near", "filled"):
        queries = [unit(rng, 14, 16), unit(rng, 10, 16)]
        if name == "near":
            queries[0][0] = pool[1][10]
        made.add(name, queries)
    return made


@pytest.fixture
def pool(tmp_path: Path) -> Made:
    """Three pool shards of 60 in 10 clusters, and no set but a balanced one."""
    rng = np.random.default_rng(1)
    made = Made(tmp_path, unit(rng, 10, 16), {"even": {"mode": "balanced", "total": 50}})
    made.add("web", [unit(rng, 60, 16) for _ in range(3)])
    return made
