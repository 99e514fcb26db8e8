"""What a backbone is, before it is loaded: what the library, the file's header and the recipe say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from curation.backbones import BackboneConfig, adjusted, unopened
from curation.libraries import (
    build_timm,
    checkpoint_metadata,
    open_clip_preparation,
    ours,
    script_preparation,
    timm_about,
    timm_metadata,
)
from curation.modelfacts import ModelFacts
from curation.preparation import Preparation
from curation.weights import check_known, file_sha256, stay_offline, weights_file
from training.config import ModelConfig
from training.export import timm_model


def backbone_facts(config: BackboneConfig, key: str = "embed") -> ModelFacts:
    """What the model is, without loading it.

    Raises:
        ConfigError: no such model, no weights, or a file that says nothing of what it holds.
    """
    path = weights_file(config, key)
    stay_offline()
    check_known(config, key)
    try:
        found = outline(config.kind, config.rest, path, config.size_px)
        preparation = adjusted(found.preparation, config)
    except Exception as error:
        raise unopened(config, key, path, error) from None
    dim = found.dim if config.pooling == "model" else found.token_dim
    is_named = config.kind in ("checkpoint", "script") or config.weights is not None
    return ModelFacts(
        name=config.kind if config.kind in ("checkpoint", "script") else config.name,
        file=path,
        sha256=file_sha256(path, key=f"{key}.weights"),
        license=found.license,
        takes=f"{preparation.size_px} px",
        dim=2 * dim if config.pooling == "cls_mean" and dim is not None else dim,
        precision=config.precision,
        is_cached=not is_named,
    )


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is known of a model before it is loaded; ``None`` where it is not known.

    Attributes:
        preparation: how it wants its pictures.
        dim: length of its features.
        token_dim: length of a token.
        license: of the weights, as the library states it.
    """

    preparation: Preparation
    dim: int | None = None
    token_dim: int | None = None
    license: str | None = None


def outline(kind: str, rest: str, path: Path, size_px: int | None) -> Outline:
    """What a library says of a model, its weights unread; a model of timm is built without memory.

    Args:
        kind: timm, open_clip, checkpoint or script.
        rest: of its name, behind the colon.
        path: of its weights.
        size_px: side of the square; None: the model's own.

    Raises:
        ValueError: as ``libraries.open_model``, as far as it can be told.
    """
    import torch

    if kind == "timm":
        metadata = timm_metadata(rest, path)
        with torch.device("meta"):
            model = build_timm(rest, metadata, size_px)
        preparation, stated = timm_about(rest, metadata, size_px)
        dim = getattr(model, "head_hidden_size", None) or model.num_features
        return Outline(preparation=preparation, dim=dim, token_dim=model.num_features, license=stated)
    if kind == "open_clip":
        import open_clip

        name, tag = rest.split("/", 1)
        shape, cfg = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag) or {}
        tower = shape["vision_cfg"]
        preparation = open_clip_preparation(cfg, size_px or tower.get("image_size", 224))
        width = None if "timm_model_name" in tower else tower.get("width", 768)
        return Outline(preparation=preparation, dim=shape["embed_dim"], token_dim=width, license=cfg.get("license"))
    if kind == "script":
        return Outline(preparation=script_preparation(size_px))
    metadata = checkpoint_metadata(path)
    if "model" in metadata:
        dim = ModelConfig.model_validate_json(metadata["model"]).shape[0]
    else:
        with torch.device("meta"):
            dim = timm_model(metadata).num_features
    return Outline(preparation=ours(metadata, size_px), dim=dim, token_dim=dim, license=metadata.get("license"))
