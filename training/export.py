"""Networks as files: our own, and as timm, Hugging Face and dinov2's hub read them.

``network.safetensors`` has backbone, heads and, in its metadata, what is needed to build them (dinov2's parameter
names under ``backbone.``, ``dino_head.``, ``ibot_head.``). ``teacher.safetensors`` has the backbone as timm names it;
its metadata say which ``timm.create_model`` call it fits (``timm_model`` makes it). No model of timm has a
convolutional stem: there the names are ours, until ``export`` writes the backbone for timm's layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.config import ConfigError, ModelConfig, ObjectiveConfig, Resolved, ViewConfig
from training.models.convert import (
    Report,
    backbone_to_hf,
    backbone_to_timm,
    check_exportable,
    load_backbone,
    timm_architecture,
)
from training.models.network import Network
from training.models.timm_stem import timm_embed_layer
from training.models.vit import VisionTransformer

NETWORK = "network.safetensors"
TEACHER = "teacher.safetensors"


class Held(NamedTuple):
    """A network read from a file."""

    network: Network
    model: ModelConfig
    views: ViewConfig


def write_network(folder: Path, state: dict[str, Tensor], resolved: Resolved) -> None:
    """Write ``network.safetensors`` and ``teacher.safetensors``, each whole or not at all.

    Args:
        folder: of the stage.
        state: of a ``Network``, unsharded.
        resolved: the recipe that made it.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("feature_map.")}
    about = {
        "model": resolved.model.model_dump_json(),
        "objective": resolved.objective.model_dump_json(),
        "views": resolved.views.model_dump_json(),
    }
    _write(folder / NETWORK, kept, about)
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in kept.items() if name.startswith("backbone.")}
    is_timm = resolved.model.stem == "linear"
    weights = backbone_to_timm(backbone, resolved.model) if is_timm else backbone
    _write(folder / TEACHER, weights, _metadata(resolved.model, resolved.views, is_timm=is_timm))


def _metadata(model: ModelConfig, views: ViewConfig, *, is_timm: bool) -> dict[str, str]:
    """What builds a backbone and prepares its pictures; ``architecture`` where timm is to build it."""
    metadata = {
        "model": model.model_dump_json(),
        "views": views.model_dump_json(),
        "img_size": str(model.image_px),
        "patch_size": str(model.patch_px),
        "mean": json.dumps(views.mean),
        "std": json.dumps(views.std),
    }
    if is_timm:
        architecture, arguments = timm_architecture(model)
        metadata |= {"architecture": architecture, "model_args": json.dumps(arguments), "stem": model.stem}
    return metadata


def timm_model(metadata: Mapping[str, str]) -> Any:
    """The model of timm that a file of ours fits, weights at random; it takes pictures of any size.

    Args:
        metadata: of the file, with ``architecture``.
    """
    import timm

    arguments: dict[str, Any] = {name: int(metadata[name]) for name in ("img_size", "patch_size") if name in metadata}
    arguments |= json.loads(metadata.get("model_args", "{}"))
    if metadata.get("stem") == "conv":
        arguments["embed_layer"] = timm_embed_layer(arguments["embed_dim"])
    return timm.create_model(metadata["architecture"], **(arguments | {"num_classes": 0, "dynamic_img_size": True}))


def _write(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    beside = path.with_name(f".{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside, metadata | {"format": "pt"})
    beside.replace(path)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, or tensors of a .pth one.

    Raises:
        ConfigError: there is no such file, or it holds no tensors.
    """
    if not path.is_file():
        raise ConfigError(f"weights: got {str(path)!r}, which is no file; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            from safetensors.torch import load_file

            with safe_open(str(path), framework="pt") as file:
                metadata = dict(file.metadata() or {})
            return load_file(str(path)), metadata
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state, {}
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"weights: {str(path)!r} cannot be read: {text:.200}") from None


def read_network(path: Path, *, with_heads: bool = True, model: ModelConfig | None = None) -> Held:
    """A network as ``write_network`` wrote it, or a backbone alone, on the CPU.

    Args:
        path: of the file.
        with_heads: take its heads too, where it has any.
        model: of a file that does not say it, such as a released one.

    Raises:
        ConfigError: nobody says what network the file holds.
    """
    state, metadata = read_state(path)
    if "model" in metadata:
        model = ModelConfig.model_validate_json(metadata["model"])
    elif model is None:
        raise ConfigError(
            f"weights: {str(path)!r} does not say what network it holds; give the {NETWORK} of a stage, or its sizes "
            "(stages.NAME.distill.model)"
        )
    has_heads = with_heads and any(name.startswith(("dino_head.", "ibot_head.")) for name in state)
    objective = ObjectiveConfig.model_validate_json(metadata["objective"]) if has_heads else ObjectiveConfig()
    network = Network(model, objective, with_heads=has_heads)
    load_backbone(network.backbone, state)
    for name, head in network.heads().items():
        head.load_state_dict(_below(state, name))
    views = ViewConfig.model_validate_json(metadata["views"]) if "views" in metadata else ViewConfig()
    return Held(network, model, views)


class Embedder(nn.Module):
    """A backbone over one size of pictures: what stands for each of them."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [C, 3, H, W], normalised, to class tokens and mean patches, [C, D] each; registers are in neither."""
        (tokens,) = self.backbone([images])
        return tokens.cls, tokens.patches.mean(1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [C, 3, H, W], normalised, to class tokens [C, D]."""
        return self.pooled(images)[0]


def _below(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors of one child, by their names in it."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def load_network(network: Network, path: Path, *, with_heads: bool) -> str:
    """Bring weights of a file into a network: ours, timm's or a released one; the position grid is resized.

    Returns:
        What was done, for a person.

    Raises:
        ConfigError: the file does not fit; names what is missing or of another shape.
    """
    state, _ = read_state(path)
    report: Report = load_backbone(network.backbone, state)
    lines = [str(report)]
    for name, head in network.heads().items():
        own = _below(state, name)
        if not own or not with_heads:
            lines.append(f"{name} starts at random")
            continue
        try:
            head.load_state_dict(own)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise ConfigError(
                f"init: {name} of {path} does not fit: {text:.200}; set init.heads=false to start it anew"
            ) from None
        lines.append(f"{name} taken")
    return "; ".join(lines)


def export(weights: Path, to: str, out: Path) -> list[Path]:
    """Write the backbone of a ``network.safetensors`` for another library.

    Args:
        weights: file of a stage.
        to: timm (safetensors), hf (a folder for ``from_pretrained``) or hub (.pth with dinov2's names).
        out: file, or folder for hf.

    Returns:
        The files written.

    Raises:
        ConfigError: the other library cannot build such a model.
    """
    held = read_network(weights, with_heads=False)
    check_exportable(held.model, to)
    state = dict(held.network.backbone.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "timm":
        _write(out, backbone_to_timm(state, held.model), _metadata(held.model, held.views, is_timm=True))
        return [out]
    if to == "hub":
        torch.save(state, out)
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    renamed, config = backbone_to_hf(state, held.model)
    _write(out / "model.safetensors", renamed, {})
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "preprocessor_config.json").write_text(json.dumps(_preprocessor(held), indent=1))
    return [out / "model.safetensors", out / "config.json", out / "preprocessor_config.json"]


def _preprocessor(held: Held) -> dict[str, Any]:
    side = held.model.image_px
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(side * 8 / 7)},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(held.views.mean),
        "image_std": list(held.views.std),
        "do_convert_rgb": True,
        "resample": 3,
    }
