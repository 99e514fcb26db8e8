"""Fit, embed, fit, assign: the stages over tables in memory and pictures encoded here."""

import hashlib
import io as stream
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.dedup.describe import vectors_of
from curation.represent import handmade
from curation.represent.cluster import ClusterConfig, Clusters
from curation.represent.embed import Embed, EmbedConfig, FitEmbedder
from curation.represent.fit_kmeans import FitKmeans
from curation.schema import TABLES, Part, image_ids
from curation.stage import Task
from curation.store import rows_within
from training.config import ConfigError


@dataclass
class Tables:
    """Parts, blobs and folders in memory; a TaskIO, a Context and a runner of tasks in one."""

    parts_held: dict[Part, pa.Table] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    pool: list[int] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    rows: pa.Table | None = None
    shard: int = -1
    role: str = "pool"
    device: str = "cpu"

    def part(self, table, index):
        return Part(TABLES[table].root, self.folders.get(table, table), index)

    def read(self, part, columns=None, *, within=None):
        table = rows_within(self.parts_held[part], within)
        return table.select(columns) if columns else table

    def table(self, name, columns=None):
        return self.read(self.part(name, 0 if TABLES[name].parts == "single" else self.shard), columns)

    def blob(self, path, offset, size, root="pool"):
        return self.blobs[path][offset : offset + size]

    def shards(self, *roles):
        return self.pool if "pool" in roles else []

    def digest(self, part):
        return hashlib.sha256(str(self.parts_held[part].to_pydict()).encode()).hexdigest()

    def num_rows(self, part):
        return self.parts_held[part].num_rows

    def map(self, tasks):
        for task in tasks:
            self.tasks.append(task)
            self.parts_held[task.writes] = task.function(self, **task.args)

    def run(self, stage, shard, rows):
        self.shard, self.rows = shard, rows
        stage.setup()
        return stage.run(shard, self)


def picture(seed: int) -> bytes:
    """A jpeg of blobs."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(60, 200)), int(rng.integers(60, 200)))
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    file = stream.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def tables() -> Tables:
    """Two pool shards of 30 pictures; the last of each did not decode."""
    tables = Tables(pool=[0, 1])
    for shard in tables.pool:
        blobs = [picture(shard * 100 + row) for row in range(29)]
        tables.blobs[f"small-{shard}.tar"] = b"".join(blobs)
        sizes = [len(blob) for blob in blobs]
        offsets = np.cumsum([0, *sizes[:-1]]).tolist()
        sha256 = [hashlib.sha256(blob).hexdigest() for blob in blobs] + ["f" * 64]
        ids = image_ids(shard, 30).tolist()
        for name, columns in {
            "hashes": {"image_id": ids, "sha256": sha256, "ok": [True] * 29 + [False]},
            "detections": {
                "image_id": ids,
                "sha256": sha256,
                "small_object": [f"small-{shard}.tar"] * 29 + [None],
                "small_offset": [*offsets, None],
                "small_bytes": [*sizes, None],
            },
        }.items():
            schema = TABLES[name].schema
            arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(30, f.type) for f in schema]
            tables.parts_held[tables.part(name, shard)] = pa.table(arrays, schema=schema)
    return tables


def rows_of(tables: Tables, shard: int, places=slice(0, 29)) -> pa.Table:
    table = tables.parts_held[tables.part("hashes", shard)].select(["image_id", "sha256"])
    return table.take(pa.array(np.arange(30)[places]))


def embedded(tables: Tables, config: EmbedConfig) -> dict[int, pa.Table]:
    fit, embed = FitEmbedder(config), Embed(config)
    tables.folders["fit_embedder"] = fit.folder("fit_embedder", tables)
    fit.run(tables, tables.map)
    tables.folders["embeddings"] = embed.folder("embeddings", tables)
    out = {}
    for shard in tables.pool:
        out[shard] = tables.run(embed, shard, rows_of(tables, shard))["embeddings"]
        tables.parts_held[tables.part("embeddings", shard)] = out[shard]
    return out


def test_handmade_from_fit_to_clusters(tables):
    made = embedded(tables, EmbedConfig(fit_pictures=40))
    assert tables.tasks[0].once
    assert tables.folders["fit_embedder"].startswith("fits/fit_embedder/hog-thumb-")
    assert tables.folders["embeddings"].startswith("embeddings/hog-thumb-")
    vectors = vectors_of(made[0])
    assert vectors.shape == (29, handmade.DIM)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    assert made[0]["image_id"].to_pylist() == image_ids(0, 29).tolist()

    cluster = ClusterConfig(num_clusters=6, iterations=5, sample=50)
    fit = FitKmeans(cluster)
    tables.folders["fit_kmeans"] = fit.folder("fit_kmeans", tables)
    fit.run(tables, tables.map)
    assert tables.tasks[-1].once
    assert tables.parts_held[tables.part("fit_kmeans", 0)].num_rows == 6
    clusters = tables.run(Clusters(cluster), 1, rows_of(tables, 1, slice(3, 20)))["clusters"]
    assert clusters.schema == TABLES["clusters"].schema
    assert clusters["image_id"].to_pylist() == image_ids(1, 29)[3:20].tolist()
    assert 0 <= min(clusters["cluster"].to_pylist()) <= max(clusters["cluster"].to_pylist()) < 6
    assert tables.run(Clusters(cluster), 1, rows_of(tables, 1, slice(0, 0)))["clusters"].num_rows == 0


def test_a_vector_does_not_depend_on_the_other_rows(tables):
    embedded(tables, EmbedConfig(fit_pictures=40))
    stage = Embed(EmbedConfig(fit_pictures=40))
    whole = tables.run(stage, 0, rows_of(tables, 0))["embeddings"]
    some = tables.run(stage, 0, rows_of(tables, 0, slice(5, 29, 7)))["embeddings"]
    assert some.to_pylist() == whole.take(pa.array(np.arange(29)[5:29:7])).to_pylist()


def test_the_folder_follows_the_model_not_the_path(tables, tmp_path):
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    folders = {}
    for name in ("a", "b"):
        save_file(model.state_dict(), str(tmp_path / f"{name}.safetensors"))
        config = EmbedConfig(name="timm:test_vit", weights=str(tmp_path / f"{name}.safetensors"), size_px=32)
        folders[name] = (embedded(tables, config), tables.folders["embeddings"])
    assert folders["a"] == folders["b"]
    assert tables.parts_held[tables.part("fit_embedder", 0)].num_rows == 0  # nothing is fitted
    some = tables.run(Embed(config), 0, rows_of(tables, 0, slice(4, 9)))["embeddings"]
    assert some.to_pylist() == folders["a"][0][0].to_pylist()[4:9]
    for changed in (
        {"size_px": 64},
        {"resize_px": 40},
        {"pooling": "cls"},
        {"precision": "bf16"},
        {"mean": (0.1, 0.2, 0.3)},
        {"batch_size": 8},
    ):
        other = config.model_copy(update=changed)
        assert Embed(other).folder("embeddings", tables) != folders["a"][1]


def test_missing_weights_stop_the_run_before_it_starts():
    config = EmbedConfig(name="script:/none/model.pt")
    with pytest.raises(ConfigError, match=r"embed.name: got '/none/model.pt', which is no file"):
        FitEmbedder(config).preflight()


def test_nothing_left_is_one_readable_line(tables):
    for shard in tables.pool:
        part = tables.part("hashes", shard)
        tables.parts_held[part] = tables.parts_held[part].slice(29)
    with pytest.raises(ConfigError, match="hog-thumb is fitted on pictures of the sources, and none of them decodes"):
        embedded(tables, EmbedConfig())
    tables.pool = []
    with pytest.raises(ConfigError, match="cluster: no picture of the sources is left"):
        FitKmeans(ClusterConfig()).run(tables, tables.map)
