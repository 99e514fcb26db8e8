"""Open an embedding model by one name. Weights come from a file first; nothing is waited for over the network.

Square, mean, standard deviation and interpolation are the model's own; a recipe may name others. TorchScript names
none: 224 px, ImageNet's values.

| name | model | weights |
|---|---|---|
| ``timm:NAME`` | a timm model; its sizes as a file of `lvd export` says | ``weights``, else Hugging Face's cache |
| ``open_clip:NAME/TAG`` | the image tower; TAG says how pictures are shown | ``weights``, else Hugging Face's cache |
| ``checkpoint:PATH`` | ``teacher.safetensors`` or ``network.safetensors`` of our trainer | PATH |
| ``script:PATH`` | a TorchScript module [N, 3, H, W] -> [N, D] | PATH |
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from curation.weights import check_known, stay_offline, weights_digest, weights_file
from training.config import EXECUTION, Config, ConfigError

if TYPE_CHECKING:
    from curation.libraries import Loaded
    from curation.preparation import Preparation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_Channels = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class BackboneConfig(Config):
    """Which model, from where, and how pictures are given to it."""

    name: str = Field(description="timm:NAME, open_clip:NAME/TAG, checkpoint:PATH or script:PATH")
    weights: str | None = Field(
        default=None, json_schema_extra=EXECUTION, description="file of timm or open_clip weights"
    )
    size_px: int | None = Field(default=None, ge=8, description="side of the square input; null: the model's own")
    resize_px: int | None = Field(
        default=None, ge=8, description="shortest side before the square is cut out; null: the model's own"
    )
    mean: _Channels | None = Field(default=None, description="of R, G, B in 0 to 1; null: the model's own")
    std: _Channels | None = Field(default=None, description="of R, G, B in 0 to 1; null: the model's own")
    pooling: Literal["model", "cls", "mean", "cls_mean"] = Field(
        default="model", description="of token models; cls_mean: class token and mean patch, each of length 1, joined"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of the products; sums of norms, pooling and unit length are fp32"
    )
    batch_size: int = Field(default=32, ge=1, description="it decides the last bits of a vector, so it is content")
    device: str = Field(default="cpu", pattern="^(cpu|cuda)$", json_schema_extra=EXECUTION)

    @property
    def kind(self) -> str:
        """What stands before the colon."""
        return self.name.partition(":")[0]

    @property
    def rest(self) -> str:
        """What stands behind the colon."""
        return self.name.partition(":")[2]

    @property
    def clip(self) -> tuple[str, str]:
        """NAME and TAG of an open_clip model."""
        name, _, tag = self.rest.partition("/")
        return name, tag


def adjusted(preparation: Preparation, config: BackboneConfig) -> Preparation:
    """With what the recipe gives in place of the model's own."""
    given = {name: getattr(config, name) for name in ("resize_px", "mean", "std") if getattr(config, name) is not None}
    return dataclasses.replace(preparation, **given)


def unopened(config: BackboneConfig, key: str, path: Path, error: Exception) -> ConfigError:
    """What a library said, as one line that names the key."""
    text = " ".join(str(error).split())
    return ConfigError(f"{key}.name: {config.name!r} cannot be opened with {path}: {text:.300}")


# The model


class Backbone:
    """A loaded model: square pictures in, features out. No picture's features depend on its neighbours in a batch.

    Attributes:
        dim: length of a feature.
        preparation: how pictures are given to it.
        license: of the weights, as the library states it; None where it states none.
        digest: sha256 of the weights file, hex.
    """

    def __init__(self, loaded: Loaded, *, config: BackboneConfig, key: str) -> None:
        import torch

        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self.preparation = adjusted(loaded.preparation, config)
        self.license = loaded.license
        self.digest = weights_digest(config, key)
        self.size_px = self.preparation.size_px
        self._config, self._key = config, key
        self._pooled = loaded.pooled
        self._model = loaded.model.to(config.device)
        self._shift, self._scale = (
            torch.tensor(values, dtype=torch.float32, device=config.device).view(1, 3, 1, 1)
            for values in (self.preparation.mean, self.preparation.std)
        )
        self.dim = int(self.embed(np.zeros((1, self.size_px, self.size_px, 3), np.uint8)).shape[1])

    def prepare(self, rgb: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [size_px, size_px, 3]."""
        return self.preparation.square(rgb)

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, size_px, size_px, 3] to float32 [N, dim]; every batch is padded to the same size.

        Raises:
            ValueError: a feature is no finite number.
        """
        import torch

        size = self._config.batch_size
        rows = []
        with torch.inference_mode():
            for start in range(0, len(pictures), size):
                block = pictures[start : start + size]
                padded = np.zeros((size, *block.shape[1:]), np.uint8)
                padded[: len(block)] = block
                pixels = torch.from_numpy(padded).to(self._config.device).permute(0, 3, 1, 2).float() / 255
                features = self._features((pixels - self._shift) / self._scale)
                rows.append(features[: len(block)].cpu().numpy())
        found = np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)
        if not np.isfinite(found).all():
            raise ValueError(
                f"{self._config.name!r} gives features that are no finite numbers in {self._config.precision}; "
                f"allowed: {self._key}.precision=bf16 or fp32, and weights that are whole"
            )
        return found

    def _features(self, pixels: Any) -> Any:
        """Normalised pictures, float32 [N, 3, H, W], to float32 [N, dim]."""
        import torch
        import torch.nn.functional as F

        precision, pooling = self._config.precision, self._config.pooling
        kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        # weights stay fp32: norms and what is added up along the blocks are as exact as while it was trained
        with torch.autocast(self._config.device, kind, enabled=kind is not None):
            if pooling == "model":
                out = self._model(pixels)
                return (out[0] if isinstance(out, tuple) else out).flatten(1).float()
            cls, mean = self._pooled(pixels)
        if pooling == "mean":
            return mean.float()
        if cls is None:
            raise ValueError(f"it has no class token, so pooling {pooling!r} means nothing; allowed: model, mean")
        if pooling == "cls":
            return cls.float()
        return torch.cat([F.normalize(part.float(), dim=1) for part in (cls, mean)], 1)


def open_backbone(config: BackboneConfig, key: str = "embed") -> Backbone:
    """Load a model.

    Raises:
        ConfigError: no such model, or the weights do not fit it; one line that names ``key``.
    """
    path = weights_file(config, key)
    stay_offline()
    check_known(config, key)
    from curation.libraries import open_model

    try:
        loaded = open_model(config.kind, config.rest, path, config.size_px)
        return Backbone(loaded, config=config, key=key)
    except Exception as error:
        raise unopened(config, key, path, error) from None
