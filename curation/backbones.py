"""Open an embedding model by one name. Weights come from a file first; nothing is waited for over the network.

| name | model | weights |
|---|---|---|
| ``timm:NAME`` | a timm model | ``weights`` (safetensors or state dict), else the Hugging Face cache |
| ``open_clip:NAME/TAG`` | the image tower of an open_clip model | ``weights``, else the cache of TAG |
| ``checkpoint:PATH`` | a teacher of our trainer: safetensors whose metadata names ``architecture`` and ``img_size`` | PATH |
| ``script:PATH`` | a TorchScript module [N, 3, H, W] -> [N, D] | PATH |
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from curation.stage import EXECUTION, Config, ConfigError

KINDS = ("timm", "open_clip", "checkpoint", "script")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BackboneConfig(Config):
    """Which model, from where, and how pictures are given to it."""

    name: str = Field(description="timm:NAME, open_clip:NAME/TAG, checkpoint:PATH or script:PATH")
    weights: str | None = Field(
        default=None, json_schema_extra=EXECUTION, description="file of timm or open_clip weights"
    )
    size_px: int | None = Field(default=None, ge=8, description="side of the square input; null: the model's own")
    pooling: str = Field(default="model", pattern="^(model|cls|mean|cls_mean)$", description="of token models")
    batch_size: int = Field(default=32, ge=1, json_schema_extra=EXECUTION)
    device: str = Field(default="cpu", pattern="^(cpu|cuda)$", json_schema_extra=EXECUTION)

    @property
    def kind(self) -> str:
        """What stands before the colon."""
        return self.name.partition(":")[0]

    @property
    def rest(self) -> str:
        """What stands behind the colon."""
        return self.name.partition(":")[2]


def weights_file(config: BackboneConfig, key: str) -> Path | None:
    """The file that the weights come from; None where they come from a cache.

    Raises:
        ConfigError: the name is not known, or the weights are neither in a file nor in the cache.
    """
    if config.kind not in KINDS or not config.rest:
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
    if _cached(config) is None:
        raise ConfigError(
            f"{key}.weights: got none, and {config.name!r} is not in the cache of Hugging Face; give a file of weights "
            f"({key}.weights=PATH), or take {key}.name=hog-thumb, which needs none"
        )
    return None


def _cached(config: BackboneConfig) -> str | None:
    """File of a model in the Hugging Face cache, None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if config.kind == "timm":
        import timm

        cfg = timm.get_pretrained_cfg(config.rest)
        repository = cfg.hf_hub_id if cfg is not None else None
        names: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    else:
        import open_clip

        name, _, tag = config.rest.partition("/")
        cfg = open_clip.get_pretrained_cfg(name, tag) or {}
        repository = str(cfg.get("hf_hub", "")).rstrip("/") or None
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
    path = weights_file(config, key)
    place = str(path) if path is not None else _cached(config)
    assert place is not None
    with Path(place).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Backbone:
    """A loaded model: square pictures in, features out. A picture's features do not depend on its neighbours in a batch."""

    def __init__(self, model: Any, *, size_px: int, mean: Any, std: Any, config: BackboneConfig) -> None:
        import torch

        torch.set_num_threads(1)
        self.size_px = size_px
        self._model = model.eval().to(config.device)
        self._mean = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1).to(config.device)
        self._std = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1).to(config.device)
        self._config = config
        self.dim = int(self.embed(np.zeros((1, size_px, size_px, 3), np.uint8)).shape[1])

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, size_px, size_px, 3] to float32 [N, dim]; batches are padded to one size, so that rows stay the same."""
        import torch

        size = self._config.batch_size
        rows = []
        with torch.inference_mode():
            for start in range(0, len(pictures), size):
                block = pictures[start : start + size]
                padded = np.zeros((size, *block.shape[1:]), np.uint8)
                padded[: len(block)] = block
                pixels = torch.from_numpy(padded).to(self._config.device).permute(0, 3, 1, 2).float() / 255
                features = self._features((pixels - self._mean) / self._std)
                rows.append(features[: len(block)].float().cpu().numpy())
        return np.concatenate(rows)

    def _features(self, pixels: Any) -> Any:
        import torch

        if self._config.pooling == "model" or not hasattr(self._model, "forward_features"):
            return self._model(pixels).flatten(1)
        tokens = self._model.forward_features(pixels)
        prefix = getattr(self._model, "num_prefix_tokens", 1)
        cls, mean = tokens[:, 0], tokens[:, prefix:].mean(1)
        return {"cls": cls, "mean": mean, "cls_mean": torch.cat([cls, mean], 1)}[self._config.pooling]


def open_backbone(config: BackboneConfig, key: str = "embed") -> Backbone:
    """Load a model.

    Raises:
        ConfigError: no such model, or the weights do not fit it; one line that names ``key``.
    """
    path = weights_file(config, key)
    opener = {"timm": _open_timm, "open_clip": _open_clip, "checkpoint": _open_checkpoint, "script": _open_script}
    try:
        return opener[config.kind](config, path)
    except ConfigError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{key}.name: {config.name!r} cannot be opened: {text:.300}") from None


def _open_timm(config: BackboneConfig, path: Path | None) -> Backbone:
    import timm

    extra = {"img_size": config.size_px} if config.size_px and "vit" in config.rest else {}
    model = timm.create_model(
        config.rest, pretrained=path is None, num_classes=0, checkpoint_path=str(path) if path else "", **extra
    )
    own = timm.data.resolve_model_data_config(model)
    return Backbone(
        model, size_px=config.size_px or own["input_size"][1], mean=own["mean"], std=own["std"], config=config
    )


def _open_clip(config: BackboneConfig, path: Path | None) -> Backbone:
    import open_clip

    name, _, tag = config.rest.partition("/")
    model = open_clip.create_model(name, pretrained=str(path) if path else tag)
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    mean = visual.image_mean or open_clip.OPENAI_DATASET_MEAN
    std = visual.image_std or open_clip.OPENAI_DATASET_STD
    return Backbone(visual, size_px=int(size), mean=mean, std=std, config=config)


def _open_checkpoint(config: BackboneConfig, path: Path | None) -> Backbone:
    import timm
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    if "architecture" not in metadata:
        raise ConfigError(f"embed.name: {path} names no architecture in its metadata; export it with lvd export")
    extra: dict[str, Any] = {name: int(metadata[name]) for name in ("img_size", "patch_size") if name in metadata}
    model = timm.create_model(metadata["architecture"], num_classes=0, dynamic_img_size=True, **extra)
    model.load_state_dict(load_file(str(path)))
    size = config.size_px or int(metadata.get("img_size", 224))
    return Backbone(model, size_px=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, config=config)


def _open_script(config: BackboneConfig, path: Path | None) -> Backbone:
    import torch

    model = torch.jit.load(str(path), map_location="cpu")
    return Backbone(model, size_px=config.size_px or 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, config=config)
