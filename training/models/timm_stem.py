"""Our convolutional stem from timm's own layers, so that timm can hold a backbone that has one.

timm has no name for it, and no argument that a file could carry: ``embed_layer`` of its vision transformers takes it.
"""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

from torch import nn

GROUP_CHANNELS = 8  # of the group norms; see vit.py
STEM_STRIDE = 8  # of the three convolutions together


def timm_embed_layer(dim: int) -> Any:
    """What ``timm.create_model(..., patch_size=patch_px // 8, embed_layer=...)`` takes for a stem of ``dim`` channels.

    It builds [C, 3, H, W] -> [C, N, D] of ``timm.layers`` alone; its tensors are named as ``to_timm_name`` says.
    """
    from timm.layers import ConvNormAct, GroupNormAct, HybridEmbed

    widths = (3, dim // 4, dim // 2, dim)
    norm = {"norm_layer": GroupNormAct, "norm_kwargs": {"group_size": GROUP_CHANNELS}}
    layers = [ConvNormAct(a, b, 3, stride=2, padding=1, **norm) for a, b in itertools.pairwise(widths)]
    return partial(HybridEmbed, backbone=nn.Sequential(*layers))


def to_timm_name(name: str) -> str:
    """``patch_embed.stem.conv0.weight`` to ``patch_embed.backbone.0.conv.weight``; all other names as they are."""
    name = re.sub(r"^patch_embed\.stem\.conv(\d)\.", r"patch_embed.backbone.\1.conv.", name)
    return re.sub(r"^patch_embed\.stem\.norm(\d)\.", r"patch_embed.backbone.\1.bn.", name)


def from_timm_name(name: str) -> str:
    """The reverse of ``to_timm_name``."""
    name = re.sub(r"^patch_embed\.backbone\.(\d)\.conv\.", r"patch_embed.stem.conv\1.", name)
    return re.sub(r"^patch_embed\.backbone\.(\d)\.bn\.", r"patch_embed.stem.norm\1.", name)
