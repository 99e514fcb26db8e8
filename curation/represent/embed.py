"""Embeddings: one unit vector of meaning for each picture that is left, and for each query picture."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.backbones import Backbone, BackboneConfig, open_backbone
from curation.dedup.describe import arrays_to_table, read_small, sample_of, table_to_arrays
from curation.dedup.near import rows_at
from curation.modelfacts import ModelFacts
from curation.represent import handmade
from curation.schema import vector_schema
from curation.stage import Context, GlobalStage, Map, Resources, ShardStage, Task, TaskIO, keyed_folder
from curation.weights import weights_digest, weights_file
from training.config import ConfigError

HANDMADE = "hog-thumb"
_SHOWN = ("size_px", "resize_px", "mean", "std", "pooling", "precision", "batch_size")  # and what is made of it
_PLACE = ["image_id", "small_object", "small_offset", "small_bytes"]


class EmbedConfig(BackboneConfig):
    """Which model gives the vectors that are clustered and retrieved by."""

    name: str = Field(HANDMADE, description="hog-thumb, timm:NAME, open_clip:NAME/TAG, checkpoint:PATH or script:PATH")
    fit_pictures: int = Field(2000, ge=2, description="of hog-thumb: pictures that fit the PCA")
    fit_shards: int = Field(16, ge=1, description="first shards of the pool that they are drawn from")

    def model_values(self) -> dict[str, Any]:
        """What decides the vectors: a name without a path, the digest of the weights, how pictures are shown, fit."""
        if self.name == HANDMADE:
            return {"name": self.name, "fit": [self.fit_pictures, self.fit_shards]}
        name = self.kind if self.kind in ("checkpoint", "script") else self.name
        weights = weights_digest(self, "embed")
        return {"name": name, "weights_sha256": weights, **{key: getattr(self, key) for key in _SHOWN}}

    @property
    def label(self) -> str:
        """For names of folders."""
        name = self.kind if self.kind in ("checkpoint", "script") else self.name
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def fit_embedder(io: TaskIO, *, shards: list[int], num_pictures: int) -> pa.Table:
    """The table ``fit_embedder``; no row for a model that needs no fit (``num_pictures`` = 0).

    Raises:
        ConfigError: no picture decoded.
    """
    if num_pictures == 0:
        return arrays_to_table({})
    pairs = [handmade.features(read_small(io, place)) for place in sample_of(io, shards, num_pictures)]
    if not pairs:
        raise ConfigError(
            f"embed.name: {HANDMADE} is fitted on pictures of the sources, and none of them decodes; "
            "`lvd funnel` shows where they went"
        )
    hogs, thumbs = (np.stack([pair[half] for pair in pairs]) for half in (0, 1))
    with _one_thread():
        return arrays_to_table(handmade.fit(hogs, thumbs))


def _one_thread() -> Any:
    """Linear algebra on one thread, so that sums are taken in one order on any machine."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


class FitEmbedder(GlobalStage):
    """The PCA of the embedded default, from the first shards of the pool; kept when lists are appended."""

    name = "fit_embedder"
    section = "embed"
    reads = ("hashes", "detections")
    writes = ("fit_embedder",)
    config: EmbedConfig

    def preflight(self) -> None:
        """The weights are there."""
        if self.config.name != HANDMADE:
            weights_file(self.config, "embed")

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the fit."""
        return self.config.model_values()

    def folder(self, table: str, context: Context) -> str:
        """``fits/fit_embedder/NAME-KEY``: of the settings and of the pictures' folder."""
        pixels = context.part("detections", 0).folder
        return f"fits/{keyed_folder(table, self.config.label, self.version, self.config.model_values(), pixels)}"

    def run(self, context: Context, map: Map) -> None:  # noqa: A002
        """One fit."""
        fits = self.config.name == HANDMADE
        shards = context.shards("pool")[: self.config.fit_shards] if fits else []
        args = {"shards": shards, "num_pictures": self.config.fit_pictures if fits else 0}
        reads = tuple(context.part(table, shard) for table in self.reads for shard in shards)
        map([Task(function=fit_embedder, args=args, reads=reads, writes=context.part("fit_embedder", 0), once=True)])


class Embed(ShardStage):
    """One vector a picture, from the 288-px intermediate."""

    name = "embed"
    section = "embed"
    kind = "facts"
    after = "leakage"
    reads: ClassVar[tuple[str, ...]] = ("leakage", "detections", "fit_embedder")
    writes = ("embeddings",)
    roles = ("pool", "query")
    config: EmbedConfig

    def __init__(self, config: EmbedConfig) -> None:
        super().__init__(config)
        self._backbone: Backbone | None = None
        self._fit: dict[str, np.ndarray] | None = None
        if config.device == "cuda" and config.name != HANDMADE:
            self.resources = Resources(gpus=1.0)

    def models(self) -> list[ModelFacts]:
        """The embedder."""
        if self.config.name == HANDMADE:
            return [ModelFacts(name=HANDMADE, takes=f"{handmade.SIDE_PX} px", dim=handmade.DIM, needs_cpu=True)]
        from curation.outline import backbone_facts

        return [backbone_facts(self.config)]

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the vectors."""
        return self.config.model_values()

    def folder(self, table: str, context: Context) -> str:
        """``embeddings/NAME-KEY``: of the model and, where there is one, of its fit."""
        fit = context.digest(context.part("fit_embedder", 0))
        pixels = context.part("detections", 0).folder
        return keyed_folder(table, self.config.label, self.version, self.config.model_values(), fit, pixels)

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Decode, embed, round to fp16."""
        table = io.table("detections", _PLACE)
        at = rows_at(table["image_id"].to_numpy(), io.rows["image_id"].to_numpy())
        places = table.take(pa.array(at)).to_pylist()
        vectors = self._handmade(io, places) if self.config.name == HANDMADE else self._model(io, places)
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        unit = (vectors / np.maximum(norms, 1e-12)).astype(np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(unit.ravel()), unit.shape[1])
        rows = io.rows
        schema = vector_schema(unit.shape[1])
        return {"embeddings": pa.table([rows["image_id"], rows["sha256"], column], schema=schema)}

    def _handmade(self, io: TaskIO, places: list[dict[str, Any]]) -> np.ndarray:
        if self._fit is None:
            self._fit = table_to_arrays(io.table("fit_embedder"))
        vectors = np.zeros((len(places), handmade.DIM), np.float32)
        with _one_thread():
            for row, place in enumerate(places):
                vectors[row] = handmade.project(*handmade.features(read_small(io, place)), self._fit)
        return vectors

    def _model(self, io: TaskIO, places: list[dict[str, Any]]) -> np.ndarray:
        if self._backbone is None:
            self._backbone = open_backbone(self.config)
        prepare = self._backbone.prepare
        vectors = np.zeros((len(places), self._backbone.dim), np.float32)
        for start in range(0, len(places), self.config.batch_size):
            block = [prepare(read_small(io, place)) for place in places[start : start + self.config.batch_size]]
            vectors[start : start + len(block)] = self._backbone.embed(np.stack(block))
        return vectors
