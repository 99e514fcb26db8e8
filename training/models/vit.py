"""Vision transformer with the parameter names of dinov2 (Oquab et al. 2023), over several sizes of crops at once.

Letters: C crops in a group, N patches, R registers, T = 1 + R + N tokens in that order, D embedding dim, P patch side.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.models.block import NORM_EPS, Block, LayerScale
from training.models.position import resize_positions


class Tokens(NamedTuple):
    """What comes out for a group of crops, after the final norm."""

    cls: Tensor  # [C, D]
    registers: Tensor  # [C, R, D]
    patches: Tensor  # [C, N, D]; [M, D] where only some were asked for


class PatchEmbed(nn.Module):
    """Pictures [C, 3, H, W] to patches [C, N, D], row by row.

    With a convolutional stem (Xiao et al. 2021) a patch also sees the edges of its neighbours, hidden ones too, and
    through the norms' statistics a little of the whole crop.
    """

    def __init__(self, dim: int, patch_px: int, stem: str) -> None:
        super().__init__()
        if stem == "conv":
            self.stem: nn.Module | None = _conv_stem(dim)
            self.proj = nn.Conv2d(dim, dim, patch_px // 8, stride=patch_px // 8)
        else:
            self.stem = None
            self.proj = nn.Conv2d(3, dim, patch_px, stride=patch_px)

    def forward(self, images: Tensor) -> Tensor:
        """[C, 3, H, W] to [C, N, D]."""
        if self.stem is not None:
            images = self.stem(images.contiguous(memory_format=torch.channels_last))
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


def _conv_stem(dim: int) -> nn.Sequential:
    """[C, 3, H, W] to [C, D, H / 8, W / 8].

    Group norm and not batch norm: a crop's tokens hang on no other crop, in teacher, export and every rank.
    """
    layers: dict[str, nn.Module] = {}
    widths = (3, dim // 4, dim // 2, dim)
    for i, (width, next_width) in enumerate(itertools.pairwise(widths)):
        layers[f"conv{i}"] = nn.Conv2d(width, next_width, 3, stride=2, padding=1, bias=False)
        layers[f"norm{i}"] = nn.GroupNorm(next_width // 8, next_width)
        layers[f"act{i}"] = nn.ReLU()
    return nn.Sequential(OrderedDict(layers))


class VisionTransformer(nn.Module):
    """A backbone.

    Attributes:
        config: what it was built from.
        dim: D.
        blocks: each takes and returns a list of groups [C, T, D].
    """

    def __init__(self, config: ModelConfig, *, attention: str = "auto") -> None:
        """Draw weights from torch's generator.

        Args:
            config: its shape.
            attention: auto, sdpa, plain or varlen; see ``block.Attention``.

        Raises:
            ConfigError: no such attention, or none here.
        """
        super().__init__()
        dim, depth, _ = config.shape
        self.config, self.dim = config, dim
        side = config.image_px // config.patch_px
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        # of no use without masks, and still there: released files have it
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, dim))
        self.patch_embed = PatchEmbed(dim, config.patch_px, config.stem)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew from torch's generator, as dinov2 does; also after ``to_empty``."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)
        if self.config.num_registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.GroupNorm, nn.LayerNorm, LayerScale)):
                module.reset_parameters()

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        wanted: Tensor | None = None,
    ) -> list[Tokens]:
        """Tokens of groups of crops, packed: see ``block``.

        Args:
            crops: groups, each float [C, 3, H, W], normalised, with its own C, H, W.
            masks: for each group bool [C, N], true where a patch is hidden; or None.
            wanted: int64 [M], into [C N] of the first group: the only patches to come out, as [M, D]; of other groups,
                and of registers, none does. Most of the last block is then left out for all others. None: all tokens.

        Returns:
            For each group its tokens, after the final norm.

        Raises:
            ValueError: a side is no multiple of the patch's, or there is not one mask a group.
        """
        groups = self._embed(crops, masks)
        *blocks, last = self.blocks
        for block in blocks:
            groups = block(groups)
        if wanted is None:
            return [self._tokens(group) for group in last(groups)]
        rows = last(groups, self._places(groups, wanted))[0]  # [M + C of all groups, D]
        patches, *classes = torch.split(rows, [len(wanted), *(len(group) for group in groups)])
        none = rows[:0]
        return [
            Tokens(self.norm(cls), none[:, None], self.norm(patches) if i == 0 else none)
            for i, cls in enumerate(classes)
        ]

    def _places(self, groups: Sequence[Tensor], wanted: Tensor) -> Tensor:
        """Among the tokens of all groups [C, T, D]: those patches of the first, then all class tokens."""
        start, length = 1 + self.config.num_registers, groups[0].shape[1]
        num_patches = length - start
        places = [wanted // num_patches * length + start + wanted % num_patches]
        begin = 0
        for group in groups:
            places.append(begin + torch.arange(len(group), device=wanted.device) * group.shape[1])
            begin += group.shape[0] * group.shape[1]
        return torch.cat(places)

    def intermediate(self, images: Tensor, num_blocks: int) -> list[Tokens]:
        """What the last blocks put out, each through the final norm, the last block last.

        Args:
            images: float [C, 3, H, W], normalised.
            num_blocks: how many.

        Raises:
            ValueError: there are not that many.
        """
        if not 1 <= num_blocks <= len(self.blocks):
            raise ValueError(f"num_blocks: got {num_blocks}; allowed: 1 to {len(self.blocks)}")
        groups, outputs = self._embed([images], None), []
        for block in self.blocks:
            groups = block(groups)
            outputs.append(groups[0])
        return [self._tokens(output) for output in outputs[-num_blocks:]]

    def _embed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> list[Tensor]:
        """Groups of crops [C, 3, H, W] to groups of tokens [C, T, D]."""
        masks = masks if masks is not None else [None] * len(crops)
        if len(masks) != len(crops):
            raise ValueError(f"masks: got {len(masks)} for {len(crops)} groups of crops; allowed: one a group")
        return [self._embed_group(images, mask) for images, mask in zip(crops, masks, strict=True)]

    def _embed_group(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """[C, 3, H, W] and bool [C, N] to [C, T, D]."""
        height, width = images.shape[-2:]
        patch_px = self.config.patch_px
        if height % patch_px or width % patch_px:
            raise ValueError(f"crops: got {height} x {width} px; allowed: multiples of the patch, {patch_px} px")
        patches = self.patch_embed(images)  # [C, N, D]
        if mask is not None:
            # before the position is added: a hidden patch is known by where it is
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        grid = (height // patch_px, width // patch_px)
        positions = resize_positions(self.pos_embed, grid, self.config.pos_resize)  # [1, 1 + N, D]
        parts = [(self.cls_token + positions[:, :1]).expand(len(images), -1, -1), patches + positions[:, 1:]]
        if self.config.num_registers:
            parts.insert(1, self.register_tokens.expand(len(images), -1, -1))
        return torch.cat(parts, dim=1)

    def _tokens(self, group: Tensor) -> Tokens:
        """Raw tokens [C, T, D] to normed ones."""
        start = 1 + self.config.num_registers
        # normed apart, so that class tokens that are kept do not keep the memory of all patches
        return Tokens(self.norm(group[:, 0]), self.norm(group[:, 1:start]), self.norm(group[:, start:]))
