"""Models as the libraries give them: what each needs to be built, filled from a file, and shown pictures.

Letters: N pictures, T tokens, D features.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.backbones import IMAGENET_MEAN, IMAGENET_STD
from curation.preparation import Preparation
from training.config import ModelConfig, ViewConfig
from training.export import Embedder, read_network, timm_model

CROP_RATIO = 0.875  # side of the square over the shortest side before it is cut out, where nobody names one


Pooled = Callable[[Any], tuple[Any | None, Any]]


def no_tokens(pixels: Any) -> tuple[Any | None, Any]:
    """The pooling of a model that has nothing to pool.

    Raises:
        ValueError: always.
    """
    raise ValueError("it gives no tokens, so there is nothing to pool; allowed: pooling=model")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model as its library gives it, in evaluation mode on the CPU.

    Attributes:
        model: normalised pictures [N, 3, H, W] to features [N, D], or a tuple that begins with them.
        preparation: how it wants its pictures.
        pooled: the same pictures to class token (None: it has none) and mean patch [N, D].
        license: of the weights, as the library states it; None where it states none.
    """

    model: Any
    preparation: Preparation
    pooled: Pooled
    license: str | None = None


def metadata_of(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; empty for any other."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError:
        return {}


def open_model(kind: str, rest: str, path: Path, size_px: int | None) -> Loaded:
    """A model with the weights of a file.

    Args:
        kind: timm, open_clip, checkpoint or script.
        rest: of its name, behind the colon.
        path: of its weights.
        size_px: side of the square; None: the model's own.

    Raises:
        ValueError: the file does not hold it, or it wants its pictures as we do not make them.
    """
    if kind == "timm":
        return open_timm(rest, path, size_px)
    if kind == "open_clip":
        name, tag = rest.split("/", 1)
        return open_clip_tower(name, tag, path=path, size_px=size_px)
    return open_checkpoint(path, size_px) if kind == "checkpoint" else open_script(path, size_px)


# timm


def timm_metadata(name: str, path: Path) -> dict[str, str]:
    """What a file that `lvd export --to timm` wrote for this model says of it; empty for files of others.

    Raises:
        ValueError: it is a file of our trainer that this model of timm does not fit.
    """
    metadata = metadata_of(path)
    if "model" not in metadata and "model_args" not in metadata:
        return {}
    fits = metadata.get("architecture")
    if fits != name.partition(".")[0]:
        way = f"timm:{fits}" if fits else "checkpoint:PATH, or what lvd export --to timm makes of it"
        raise ValueError(f"it was written by our trainer for another model; allowed: {way}")
    return metadata


def build_timm(name: str, metadata: dict[str, str], size_px: int | None) -> Any:
    """A model of timm without its classifier, weights at random."""
    import timm

    if metadata:
        return timm_model(metadata)
    cfg = timm.get_pretrained_cfg(name)
    fixed = size_px is not None and cfg is not None and cfg.fixed_input_size
    return timm.create_model(name, pretrained=False, num_classes=0, **({"img_size": size_px} if fixed else {}))


def open_timm(name: str, path: Path, size_px: int | None) -> Loaded:
    """A timm model with the weights of a file.

    Raises:
        ValueError: the file lacks arrays of the model, or the model wants its pictures as we do not make them.
    """
    import timm

    metadata = timm_metadata(name, path)
    model = build_timm(name, metadata, size_px)
    # The filter renames keys of other people's files and resamples position embeddings to this size.
    filter_fn = None if metadata else getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    result = timm.models.load_checkpoint(model, str(path), strict=False, filter_fn=filter_fn)
    if result is not None and result.missing_keys:
        raise ValueError(f"{len(result.missing_keys)} arrays of the model are not in it, the first is "
                         f"{result.missing_keys[0]}")  # fmt: skip
    preparation, stated = timm_about(name, metadata, size_px)
    return Loaded(model=model.eval(), preparation=preparation, pooled=_pooled_by_timm(model), license=stated)


def timm_about(name: str, metadata: dict[str, str], size_px: int | None) -> tuple[Preparation, str | None]:
    """How a model of timm wants its pictures, and the licence of its weights as it is stated."""
    import timm

    if metadata:
        return ours(metadata, size_px), metadata.get("license")
    cfg = timm.get_pretrained_cfg(name)
    own = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg is not None else {})
    return timm_preparation(own, size_px), getattr(cfg, "license", None)


def timm_preparation(own: dict[str, Any], size_px: int | None) -> Preparation:
    """What timm's transform for evaluation does, from its data configuration or a ``pretrained_cfg``."""
    mode = own.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f"it pads its pictures (crop_mode {mode!r}); allowed: center, squash")
    _, height, width = own["input_size"]
    if size_px is None and height != width:
        raise ValueError(f"it takes pictures of {width} x {height} px; give size_px=N for squares")
    size = size_px or int(height)
    return Preparation(
        size_px=size,
        resize_px=math.floor(size / (own.get("crop_pct") or CROP_RATIO)),
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        interpolation=own["interpolation"],
        squash=mode == "squash",
    )


def _pooled_by_timm(model: Any) -> Pooled:
    if not hasattr(model, "forward_features"):
        return no_tokens
    has_class = getattr(model, "cls_token", None) is not None
    num_prefix = getattr(model, "num_prefix_tokens", int(has_class))
    # models that pool patches have their last norm behind the pooling
    norm = getattr(model, "fc_norm", None) or (lambda pooled: pooled)

    def pooled(pixels: Any) -> tuple[Any | None, Any]:
        tokens = model.forward_features(pixels)  # [N, T, D]
        if tokens.ndim != 3:
            return no_tokens(pixels)
        return norm(tokens[:, 0]) if has_class else None, norm(tokens[:, num_prefix:].mean(1))

    return pooled


# open_clip


def open_clip_tower(name: str, tag: str, *, path: Path, size_px: int | None) -> Loaded:
    """The image tower of an open_clip model with the weights of a file.

    ``model`` is what ``encode_image`` gives: pooled and projected. Tokens come before the projection, normed.
    """
    import open_clip

    # A file says nothing about how its pictures were prepared, nor about the activation: the tag does.
    cfg = open_clip.get_pretrained_cfg(name, tag) or {}
    model = open_clip.create_model(
        name,
        pretrained=str(path),
        force_image_size=size_px,
        force_quick_gelu=bool(cfg.get("quick_gelu")),
        require_pretrained=True,
    )
    tower = model.visual.eval()
    size = tower.image_size
    return Loaded(
        model=tower,
        preparation=open_clip_preparation(cfg, int(size[0] if isinstance(size, (tuple, list)) else size)),
        pooled=_pooled_by_open_clip(tower),
        license=cfg.get("license"),
    )


def open_clip_preparation(cfg: dict[str, Any], size_px: int) -> Preparation:
    """What open_clip's transform for inference does."""
    import open_clip

    mode = cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ValueError(f"it pads its pictures (resize_mode {mode!r}); allowed: shortest, squash")
    return Preparation(
        size_px=size_px,
        resize_px=size_px,
        mean=tuple(cfg.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(cfg.get("std") or open_clip.OPENAI_DATASET_STD),
        interpolation=cfg.get("interpolation") or "bicubic",
        squash=mode == "squash",
    )


def _pooled_by_open_clip(tower: Any) -> Pooled:
    from open_clip.transformer import VisionTransformer

    if hasattr(tower, "trunk"):
        return _pooled_by_timm(tower.trunk)
    if not isinstance(tower, VisionTransformer) or tower.attn_pool is not None:
        return no_tokens

    def pooled(pixels: Any) -> tuple[Any | None, Any]:
        found = tower.forward_intermediates(
            pixels,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return found["image_intermediates_prefix"][-1][:, 0], found["image_intermediates"][-1].mean(1)

    return pooled


# Our own


def ours(metadata: dict[str, str], size_px: int | None) -> Preparation:
    """What a file of our trainer says of its pictures; the square is cut out as for released DINOv2."""
    size = size_px or int(metadata.get("img_size", 224))
    return Preparation(
        size_px=size,
        resize_px=round(size / CROP_RATIO),
        mean=tuple(json.loads(metadata.get("mean", "null")) or IMAGENET_MEAN),
        std=tuple(json.loads(metadata.get("std", "null")) or IMAGENET_STD),
    )


def checkpoint_metadata(path: Path) -> dict[str, str]:
    """What a file of our trainer says of itself, with size, mean and standard deviation of its pictures.

    Raises:
        ValueError: it does not say what it holds.
    """
    metadata = metadata_of(path)
    if "architecture" not in metadata and "model" not in metadata:
        raise ValueError("its metadata names no architecture; give the teacher.safetensors that `lvd train` wrote")
    if "model" in metadata and "views" in metadata:
        model, views = (
            ModelConfig.model_validate_json(metadata["model"]),
            ViewConfig.model_validate_json(metadata["views"]),
        )
        metadata |= {"img_size": str(model.image_px), "mean": json.dumps(views.mean), "std": json.dumps(views.std)}
    return metadata


def open_checkpoint(path: Path, size_px: int | None) -> Loaded:
    """A backbone of our trainer: through timm where its names are timm's, else through our own model.

    Raises:
        ValueError: the file does not say what it holds.
    """
    metadata = checkpoint_metadata(path)
    if "architecture" in metadata:
        from safetensors.torch import load_file

        model = timm_model(metadata)
        model.load_state_dict(load_file(str(path)))
        pooled = _pooled_by_timm(model)
    else:
        model = Embedder(read_network(path, with_heads=False).network.backbone)
        pooled = model.pooled
    return Loaded(
        model=model.eval(), preparation=ours(metadata, size_px), pooled=pooled, license=metadata.get("license")
    )


def open_script(path: Path, size_px: int | None) -> Loaded:
    """A TorchScript module; it says nothing of its pictures."""
    import torch

    model = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return Loaded(model=model.eval(), preparation=script_preparation(size_px), pooled=no_tokens)


def script_preparation(size_px: int | None) -> Preparation:
    """224 px and ImageNet's values, where the recipe gives none."""
    size = size_px or 224
    return Preparation(size_px=size, resize_px=round(size / CROP_RATIO), mean=IMAGENET_MEAN, std=IMAGENET_STD)
