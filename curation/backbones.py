"""Open an embedding model by one name. Weights come from a file first; nothing is waited for over the network.

Square size, mean and standard deviation are the model's own. TorchScript names none: 224 px, ImageNet's values.

| name | model | weights |
|---|---|---|
| ``timm:NAME`` | a timm model | ``weights`` (safetensors or state dict), else the Hugging Face cache |
| ``open_clip:NAME/TAG`` | the image tower of an open_clip model | ``weights``, else the cache of TAG |
| ``checkpoint:PATH`` | ``teacher.safetensors`` of our trainer, whose metadata name the timm model that it fits | PATH |
| ``script:PATH`` | a TorchScript module [N, 3, H, W] -> [N, D] | PATH |
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from training.config import EXECUTION, Config, ConfigError

KINDS = ("timm", "open_clip", "checkpoint", "script")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875  # side of the square over shortest side of the resized picture, where the model names none
MAX_ASPECT = 8  # of what is resized: the square, and what the filter sees beyond it even where a side is one pixel


class BackboneConfig(Config):
    """Which model, from where, and how pictures are given to it."""

    name: str = Field(description="timm:NAME, open_clip:NAME/TAG, checkpoint:PATH or script:PATH")
    weights: str | None = Field(
        default=None, json_schema_extra=EXECUTION, description="file of timm or open_clip weights"
    )
    size_px: int | None = Field(default=None, ge=8, description="side of the square input; null: the model's own")
    pooling: str = Field(default="model", pattern="^(model|cls|mean|cls_mean)$", description="of token models")
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


def _offline() -> None:
    """Keep the hub's client from retrying for a minute: what is needed is in a file or in its cache, or is an error."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def weights_file(config: BackboneConfig, key: str) -> Path:
    """The file that the weights come from: the one given, else the one in the cache of Hugging Face.

    Raises:
        ConfigError: the name is not known, or the weights are neither in a file nor in the cache.
    """
    shaped = config.kind != "open_clip" or all(config.rest.partition("/"))
    if config.kind not in KINDS or not config.rest or not shaped:
        raise ConfigError(f"{key}.name: got {config.name!r}, allowed: hog-thumb, timm:NAME, open_clip:NAME/TAG, "
                          "checkpoint:PATH, script:PATH")  # fmt: skip
    given = config.rest if config.kind in ("checkpoint", "script") else config.weights
    if given is not None:
        if not Path(given).is_file():
            where = f"{key}.name" if config.kind in ("checkpoint", "script") else f"{key}.weights"
            raise ConfigError(
                f"{where}: got {given!r}, which is no file; give the path of the weights, or take hog-thumb"
            )
        return Path(given)
    cached = _cached(config, key)
    if cached is None:
        raise ConfigError(
            f"{key}.weights: got none, and {config.name!r} is not in the cache of Hugging Face; give a file of weights "
            f"({key}.weights=PATH), or take {key}.name=hog-thumb, which needs none"
        )
    return Path(cached)


def _cached(config: BackboneConfig, key: str) -> str | None:
    """File of a model in the Hugging Face cache, None where it is not there."""
    _offline()
    from huggingface_hub import try_to_load_from_cache

    if config.kind == "timm":
        import timm

        if not timm.is_model(config.rest):
            raise ConfigError(f"{key}.name: got {config.name!r}; timm {timm.__version__} has no model {config.rest!r}")
        cfg = timm.get_pretrained_cfg(config.rest)
        repository = cfg.hf_hub_id if cfg is not None else None
        names: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    else:
        import open_clip

        name, _, tag = config.rest.partition("/")
        if name not in open_clip.list_models():
            raise ConfigError(f"{key}.name: got {config.name!r}; open_clip has no model {name!r}")
        repository = str((open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")).rstrip("/") or None
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if not repository:
        return None
    for file in names:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return found
    return None


def weights_digest(config: BackboneConfig, key: str) -> str:
    """sha256 of the weights, hex."""
    return file_sha256(weights_file(config, key), key=f"{key}.weights")


def file_sha256(path: str | Path, *, key: str) -> str:
    """sha256 of a file of weights, hex. It is read once a process, for as long as it stays the same.

    Raises:
        ConfigError: there is no such file; one line that names ``key``.
    """
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ConfigError(
            f"{key}: got {str(path)!r}, which cannot be read ({error.strerror}); give the path of a file"
        ) from None
    return _file_digest(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _file_digest(path: str, mtime_ns: int, num_bytes: int) -> str:
    del mtime_ns, num_bytes  # part of the key only
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model as its library gives it, and how it wants its pictures."""

    model: Any
    size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float = CROP_RATIO
    license: str | None = None  # as its library states it; None where it states none


class Backbone:
    """A loaded model: square pictures in, features out. No picture's features depend on its neighbours in a batch.

    Attributes:
        dim: length of a feature.
        size_px: side of the square that it takes.
        mean: of each channel, of pixels in 0 to 1; subtracted.
        std: of each channel; divided by.
        license: of the weights, as the library states it; None where it states none.
        digest: sha256 of the weights file, hex.
    """

    def __init__(self, loaded: Loaded, *, config: BackboneConfig, key: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.size_px, self.mean, self.std = loaded.size_px, loaded.mean, loaded.std
        self.license = loaded.license
        self.digest = weights_digest(config, key)
        self._crop_ratio = loaded.crop_ratio
        self._model = loaded.model.eval().to(config.device)
        self._shift = torch.tensor(self.mean, dtype=torch.float32).view(1, 3, 1, 1).to(config.device)
        self._scale = torch.tensor(self.std, dtype=torch.float32).view(1, 3, 1, 1).to(config.device)
        self._config = config
        self.dim = int(self.embed(np.zeros((1, self.size_px, self.size_px, 3), np.uint8)).shape[1])

    def prepare(self, rgb: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [size_px, size_px, 3]: shortest side resized (bicubic), centre cut out.

        A strip is cut to its middle first: 2 x 40,000 pixels would become 256 x 5,120,000.
        """
        from PIL import Image

        longest = MAX_ASPECT * min(rgb.shape[:2])
        top, left = (max(0, (side - longest) // 2) for side in rgb.shape[:2])
        rgb = rgb[top : rgb.shape[0] - top, left : rgb.shape[1] - left]
        height, width = rgb.shape[:2]
        scale = max(self.size_px, round(self.size_px / self._crop_ratio)) / min(height, width)
        size = (max(self.size_px, round(width * scale)), max(self.size_px, round(height * scale)))
        left, top = (size[0] - self.size_px) // 2, (size[1] - self.size_px) // 2
        resized = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
        return np.ascontiguousarray(resized[top : top + self.size_px, left : left + self.size_px])

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, size_px, size_px, 3] to float32 [N, dim]; every batch is padded to the same size."""
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
                rows.append(features[: len(block)].float().cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)

    def _features(self, pixels: Any) -> Any:
        import torch

        if self._config.pooling == "model":
            return self._model(pixels).flatten(1)
        tokens = self._model.forward_features(pixels) if hasattr(self._model, "forward_features") else None
        if tokens is None or tokens.ndim != 3:
            raise ValueError(f"it gives no tokens, so pooling {self._config.pooling!r} means nothing; allowed: model")
        cls, mean = tokens[:, 0], tokens[:, self._model.num_prefix_tokens :].mean(1)
        return {"cls": cls, "mean": mean, "cls_mean": torch.cat([cls, mean], 1)}[self._config.pooling]


def open_backbone(config: BackboneConfig, key: str = "embed") -> Backbone:
    """Load a model.

    Raises:
        ConfigError: no such model, or the weights do not fit it; one line that names ``key``.
    """
    path = weights_file(config, key)
    _offline()
    opener = {"timm": _open_timm, "open_clip": _open_clip, "checkpoint": _open_checkpoint, "script": _open_script}
    try:
        return Backbone(opener[config.kind](config, path), config=config, key=key)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{key}.name: {config.name!r} cannot be opened with {path}: {text:.300}") from None


def _open_timm(config: BackboneConfig, path: Path) -> Loaded:
    import timm

    cfg = timm.get_pretrained_cfg(config.rest)
    fixed = config.size_px is not None and cfg is not None and cfg.fixed_input_size
    extra = {"img_size": config.size_px} if fixed else {}
    model = timm.create_model(config.rest, pretrained=False, num_classes=0, **extra)
    # The filter renames keys of other people's files and resamples position embeddings to this size.
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    result = timm.models.load_checkpoint(model, str(path), strict=False, filter_fn=filter_fn)
    if result is not None and result.missing_keys:
        raise ValueError(f"{len(result.missing_keys)} arrays of the model are not in it, the first is "
                         f"{result.missing_keys[0]}")  # fmt: skip
    own = timm.data.resolve_model_data_config(model)
    return Loaded(
        model=model,
        size_px=config.size_px or int(own["input_size"][1]),
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        crop_ratio=float(own["crop_pct"]),
        license=getattr(cfg, "license", None),
    )


def _open_clip(config: BackboneConfig, path: Path) -> Loaded:
    import open_clip

    name, _, tag = config.rest.partition("/")
    # A file says nothing about how its pictures were prepared, nor about the activation: the tag does.
    cfg = open_clip.get_pretrained_cfg(name, tag) or {}
    model = open_clip.create_model(
        name,
        pretrained=str(path),
        force_image_size=config.size_px,
        force_quick_gelu=bool(cfg.get("quick_gelu")),
        require_pretrained=True,
    )
    size = model.visual.image_size
    return Loaded(
        model=model.visual,
        size_px=int(size[0] if isinstance(size, (tuple, list)) else size),
        mean=tuple(cfg.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(cfg.get("std") or open_clip.OPENAI_DATASET_STD),
        crop_ratio=1.0,
    )


def _open_checkpoint(config: BackboneConfig, path: Path) -> Loaded:
    import timm
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    model: Any
    if "architecture" not in metadata and "img_size" in metadata:  # a backbone that only the trainer builds
        from training.export import Embedder, read_network

        model = Embedder(read_network(path, with_heads=False).network.backbone)
    elif "architecture" in metadata:
        extra: dict[str, Any] = {name: int(metadata[name]) for name in ("img_size", "patch_size") if name in metadata}
        extra |= json.loads(metadata.get("model_args", "{}"))
        model = timm.create_model(metadata["architecture"], **(extra | {"num_classes": 0, "dynamic_img_size": True}))
        model.load_state_dict(load_file(str(path)))
    else:
        raise ValueError("its metadata names no architecture; give the teacher.safetensors that `lvd train` wrote")
    return Loaded(
        model=model,
        size_px=config.size_px or int(metadata.get("img_size", 224)),
        mean=tuple(json.loads(metadata.get("mean", "null")) or IMAGENET_MEAN),
        std=tuple(json.loads(metadata.get("std", "null")) or IMAGENET_STD),
        license=metadata.get("license"),
    )


def _open_script(config: BackboneConfig, path: Path) -> Loaded:
    import torch

    model = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return Loaded(model=model, size_px=config.size_px or 224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
