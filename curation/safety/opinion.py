"""Second opinion on explicit pictures: a head on the features of an image model, both from files.

The head is a small network of linear layers with ReLU between them: a state dict (safetensors, or a file of torch)
whose matrices are named ``….N.weight`` and ``….N.bias`` and are taken in the order of N. Its one output is the score,
through a sigmoid unless the recipe says otherwise. No head comes with lvd, and none was measured.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.backbones import Backbone, BackboneConfig, open_backbone
from curation.dedup.describe import PLACE, read_small
from curation.dedup.near import rows_at
from curation.modelfacts import ModelFacts
from curation.schema import TABLES
from curation.stage import Context, ShardStage, TaskIO, empty_table, keyed_folder
from curation.weights import file_sha256, weights_digest, weights_file
from training.config import EXECUTION, ConfigError

_OFF = "none"
_LAYER = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)")
_SHOWN = ("size_px", "resize_px", "mean", "std", "pooling", "precision", "batch_size")


class OpinionConfig(BackboneConfig):
    """Which model and head are asked; thresholds stand in ``safety``."""

    name: str = Field(_OFF, description="none, or open_clip:NAME/TAG, timm:NAME, checkpoint:PATH, script:PATH")
    head: str | None = Field(
        None, json_schema_extra=EXECUTION, description="file of linear layers, D features in, 1 out"
    )
    activation: Literal["sigmoid", "none"] = Field("sigmoid", description="of the head's output; none: it is a score")
    unit_features: bool = Field(True, description="the head is given features of length 1")
    from_score: float = Field(
        0.0, ge=0, le=1, description="only pictures whose nsfw_score is at least this are shown to the head; 0: all"
    )

    @property
    def is_asked(self) -> bool:
        """Whether there is a second opinion."""
        return self.name != _OFF

    def model_values(self) -> dict[str, Any]:
        """What decides the scores: a name without a path, digests of both files, how pictures are shown."""
        if not self.is_asked:
            return {}
        name = self.kind if self.kind in ("checkpoint", "script") else self.name
        digests = {"weights_sha256": weights_digest(self, "opinion"), "head_sha256": _head_sha256(self)}
        settings = {key: getattr(self, key) for key in (*_SHOWN, "activation", "unit_features", "from_score")}
        return {"name": name, **digests, **settings}


def _head_sha256(config: OpinionConfig) -> str:
    if config.head is None or not Path(config.head).is_file():
        raise ConfigError(
            f"opinion.head: got {config.head!r}, which is no file; give a state dict of linear layers that was trained "
            f"on the features of {config.name!r}, or set opinion.name=none"
        )
    return file_sha256(config.head, key="opinion.head")


class Head:
    """Linear layers with ReLU between them.

    Attributes:
        dim: length of the features that it takes.
    """

    def __init__(self, layers: list[tuple[np.ndarray, np.ndarray]], *, activation: str, unit_features: bool) -> None:
        self.dim = layers[0][0].shape[1]
        self._layers, self._activation, self._unit = layers, activation, unit_features

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Float [N, dim] to float32 [N]; no picture's score depends on its neighbours."""
        found = np.zeros(len(features), np.float32)
        for row, feature in enumerate(features.astype(np.float64)):
            values = feature / max(float(np.linalg.norm(feature)), 1e-12) if self._unit else feature
            for number, (weight, bias) in enumerate(self._layers):
                values = np.maximum(values, 0) if number else values
                values = np.einsum("ij,j->i", weight, values) + bias
            found[row] = 1 / (1 + np.exp(-values[0])) if self._activation == "sigmoid" else values[0]
        return found


def open_head(config: OpinionConfig) -> Head:
    """The head from its file.

    Raises:
        ConfigError: it is no such file; one line that names it and what it holds.
    """
    _head_sha256(config)
    path = str(config.head)
    try:
        layers = _layers_of(_state_of(path))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"opinion.head: {path!r} is no state dict of linear layers ({text:.200}); allowed: matrices "
            "N.weight [out, in] and N.bias [out] that fit one behind the other and end in one number"
        ) from None
    return Head(layers, activation=config.activation, unit_features=config.unit_features)


def _state_of(path: str) -> dict[str, np.ndarray]:
    """Arrays by name, float64."""
    if path.endswith(".safetensors"):
        from safetensors.numpy import load_file

        return {name: np.asarray(array, np.float64) for name, array in load_file(path).items()}
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def _layers_of(state: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight [out, in] and bias [out] of each layer, in order.

    Raises:
        ValueError: names what does not fit.
    """
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, array in state.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is neither N.weight nor N.bias")
        found.setdefault(int(match[1]), {})[match[2]] = array
    layers: list[tuple[np.ndarray, np.ndarray]] = []
    for number, arrays in sorted(found.items()):
        weight = arrays.get("weight", np.zeros(0))
        if weight.ndim != 2 or (layers and weight.shape[1] != len(layers[-1][1])):
            raise ValueError(f"{number}.weight is {list(weight.shape)}, behind {len(layers[-1][1]) if layers else 'D'}")
        bias = arrays.get("bias", np.zeros(len(weight)))
        if bias.shape != (len(weight),):
            raise ValueError(f"{number}.bias is {list(bias.shape)}, {number}.weight {list(weight.shape)}")
        layers.append((weight, bias))
    if not layers or len(layers[-1][1]) != 1:
        raise ValueError(f"it ends in {len(layers[-1][1]) if layers else 0} numbers")
    return layers


class SecondOpinion(ShardStage):
    """One score a picture, from the 288-px intermediate with blurred faces; empty parts where nobody is asked.

    Pictures of query sets and benchmarks are not judged, so they have no score.
    """

    name = "opinion"
    section = "opinion"
    kind = "facts"
    after: ClassVar[str | None] = "fetched"
    reads: ClassVar[tuple[str, ...]] = ("fetched", "detections")
    writes = ("opinions",)
    roles = ("pool", "query", "benchmark")
    config: OpinionConfig

    def __init__(self, config: OpinionConfig) -> None:
        super().__init__(config)
        self._opened: tuple[Backbone, Head] | None = None
        if not config.is_asked:
            self.after = None  # type: ignore[misc]  # no row is let through to it

    def preflight(self) -> None:
        """Both files are there, and the head is one."""
        if self.config.is_asked:
            weights_file(self.config, "opinion")
            open_head(self.config)

    def models(self) -> list[ModelFacts]:
        """The image model and the head."""
        if not self.config.is_asked:
            return []
        from curation.outline import backbone_facts

        path, sha256 = Path(str(self.config.head)), _head_sha256(self.config)
        head = ModelFacts(name="head", takes="features", file=path, sha256=sha256, precision="fp64", needs_cpu=True)
        return [backbone_facts(self.config, "opinion"), head]

    def fingerprint_values(self) -> dict[str, Any]:
        """What decides the scores."""
        return self.config.model_values()

    def folder(self, table: str, context: Context) -> str:
        """``opinions/NAME-KEY``: of the model, the head and the pictures' folder."""
        if not self.config.is_asked:
            return keyed_folder(table, _OFF, self.version)
        label = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.config.model_values()["name"])
        pixels = context.part("detections", 0).folder
        return keyed_folder(table, label, self.version, self.config.model_values(), pixels)

    def run(self, shard: int, io: TaskIO) -> dict[str, pa.Table]:
        """Decode, embed, score, block by block.

        Raises:
            ConfigError: the head takes features of another length than the model gives.
        """
        del shard
        if not self.config.is_asked:
            return {"opinions": empty_table("opinions")}
        table = io.table("detections", [*PLACE, "nsfw_score"])
        at = rows_at(table["image_id"].to_numpy(), io.rows["image_id"].to_numpy())
        places = table.take(pa.array(at)).to_pylist()
        asked = [
            row
            for row, place in enumerate(places)
            if io.role == "pool" and place["small_object"] and place["nsfw_score"] >= self.config.from_score
        ]
        scores: list[float | None] = [None] * len(places)
        for start in range(0, len(asked), self.config.batch_size):
            block = asked[start : start + self.config.batch_size]
            backbone, head = self._models()
            squares = np.stack([backbone.prepare(read_small(io, places[row])) for row in block])
            for row, score in zip(block, head.scores(backbone.embed(squares)).tolist(), strict=True):
                scores[row] = score
        columns = [io.rows["image_id"], io.rows["sha256"], pa.array(scores, pa.float32())]
        return {"opinions": pa.table(columns, schema=TABLES["opinions"].schema)}

    def _models(self) -> tuple[Backbone, Head]:
        if self._opened is None:
            backbone, head = open_backbone(self.config, "opinion"), open_head(self.config)
            if head.dim != backbone.dim:
                raise ConfigError(
                    f"opinion.head: {self.config.head!r} takes {head.dim} features, {self.config.name!r} gives "
                    f"{backbone.dim}; give a head that was trained on them"
                )
            self._opened = backbone, head
        return self._opened
