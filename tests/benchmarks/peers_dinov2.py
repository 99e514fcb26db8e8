"""Runs the training step of facebookresearch/dinov2 on one CPU, from a checkout that lies elsewhere.

dinov2 asks for xformers and wraps its networks in an FSDP that today's torch no longer has. Here xformers is a stand-in
of our own (``xformers_stand_in``), the process group is gloo with one rank, nothing is wrapped, ``Tensor.cuda`` does
nothing, the grad scaler is off, and the loop is dinov2's own without logging and checkpoints. Everything in the step
itself is dinov2's: networks, losses, backward, parameter groups, schedules, clipping by submodule.

dinov2 needs packages that this project does not: make them visible by PYTHONPATH, from an environment of their own
(``pip install --target FOLDER --no-deps omegaconf antlr4-python3-runtime==4.9.3 fvcore iopath yacs portalocker tabulate
submitit cloudpickle torchmetrics lightning-utilities termcolor``).
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ARCH = "vit_of_ours"


# Stand-in for xformers.ops


class BlockDiagonalMask:
    """Sequences of several lengths beside each other in one row; each attends to itself."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        self._batch_sizes: Sequence[int] = [1] * len(lengths)
        self._lengths = list(lengths)

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> BlockDiagonalMask:
        """Of the lengths of the sequences."""
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """Of tensors [b_i, n_i, D], with their row [1, sum of b_i n_i, D]."""
        mask = cls([tensor.shape[1] for tensor in tensors for _ in range(len(tensor))])
        mask._batch_sizes = [len(tensor) for tensor in tensors]
        return mask, torch.cat([tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in tensors], dim=1)

    def split(self, row: Tensor) -> list[Tensor]:
        """A row [1, T, D] as tensors [b_i, n_i, D]."""
        shapes, first = [], 0
        for size in self._batch_sizes:
            shapes.append((size, self._lengths[first]))
            first += size
        parts = row.split([size * length for size, length in shapes], dim=1)
        return [part.reshape(*shape, *row.shape[2:]) for part, shape in zip(parts, shapes, strict=True)]


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask | None = None) -> Tensor:
    """[C, T, H, d] -> [C, T, H, d]: one call of torch's fused attention for each length of sequence."""
    if attn_bias is None:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    outputs, first = [], 0
    for length, count in attn_bias.runs:
        last = first + length * count
        parts = [x[:, first:last].reshape(count, length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v)]
        outputs.append(F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(1, last - first, *q.shape[2:]))
        first = last
    return torch.cat(outputs, dim=1)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Chosen rows of each source, all in one flat tensor."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(x: Tensor, index: Tensor, source: Tensor, scaling: Tensor, alpha: float) -> Tensor:
    """X [C, T, D] with ``alpha * scaling * source`` added at rows ``index``."""
    return torch.index_add(x, 0, index, source * scaling, alpha=alpha)


class SwiGLU(nn.Module):
    """Gated MLP with both inputs in one matrix."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def xformers_stand_in() -> None:
    """Put a module named xformers in place; without cross_entropy, for which dinov2 has code of its own."""
    xformers, ops, fmha = ModuleType("xformers"), ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha")
    fmha.BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
    members = [memory_efficient_attention, index_select_cat, scaled_index_add, SwiGLU]
    vars(ops).update({member.__name__: member for member in members} | {"unbind": torch.unbind, "fmha": fmha})
    xformers.ops = ops  # type: ignore[attr-defined]
    sys.modules |= {"xformers": xformers, "xformers.ops": ops, "xformers.ops.fmha": fmha}


# dinov2


def prepare(path: Path) -> None:
    """Make the checkout importable and runnable on a CPU."""
    if not (path / "dinov2" / "train").is_dir():
        sys.exit(f"no checkout of facebookresearch/dinov2 at {path}")
    warnings.filterwarnings("ignore")
    xformers_stand_in()
    sys.path.insert(0, str(path))
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Dinov2:
    """dinov2's student, teacher, losses and optimiser, and its loop a step at a time.

    Args:
        values: laid over dinov2's default configuration.
        shape: (embedding dim, blocks, heads) of the backbone.
    """

    def __init__(self, values: dict[str, Any], shape: tuple[int, int, int]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            from dinov2.configs import dinov2_default_config
            from dinov2.layers import MemEffAttention, NestedTensorBlock
            from dinov2.models import vision_transformer
            from dinov2.train.ssl_meta_arch import SSLMetaArch
            from dinov2.train.train import build_optimizer, build_schedulers
            from dinov2.utils.config import apply_scaling_rules_to_cfg
            from omegaconf import OmegaConf
        dim, depth, heads = shape
        vars(vision_transformer)[ARCH] = partial(
            vision_transformer.DinoVisionTransformer,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
        )
        ours = OmegaConf.create({"compute_precision": {"grad_scaler": False}, "student": {"arch": ARCH}})
        self.config = OmegaConf.merge(OmegaConf.create(dinov2_default_config), ours, OmegaConf.create(values))
        apply_scaling_rules_to_cfg(self.config)
        self.arch = SSLMetaArch(self.config)
        self.arch.need_to_synchronize_fsdp_streams = False
        self.arch.train()
        self.start_teacher()
        self.optimizer = build_optimizer(self.config, self.arch.get_params_groups())
        self.schedules = build_schedulers(self.config)

    def start_teacher(self) -> None:
        """Make the teacher equal to the student."""
        for name, module in self.arch.student.items():
            self.arch.teacher[name].load_state_dict(module.state_dict())

    def step(self, images: dict[str, Any], iteration: int) -> tuple[dict[str, float], dict[str, float]]:
        """One step, as in dinov2's loop.

        Returns:
            Losses as dinov2 logs them; norms of the gradients before they are clipped, by submodule.
        """
        from dinov2.train.train import apply_optim_scheduler

        lr, wd, momentum, temperature, last_layer_lr = (schedule[iteration] for schedule in self.schedules)
        apply_optim_scheduler(self.optimizer, lr, wd, last_layer_lr)
        self.optimizer.zero_grad(set_to_none=True)
        images = images | {"n_masked_patches": images["n_masked_patches"].clone()}  # summed over ranks in place
        losses = self.arch.forward_backward(images, teacher_temp=temperature)
        norms = {}
        for name, module in self.arch.student.items():
            norms[name] = float(nn.utils.clip_grad_norm_(module.parameters(), self.config.optim.clip_grad))
        self.optimizer.step()
        with torch.no_grad():
            for name, module in self.arch.student.items():
                student, teacher = list(module.parameters()), list(self.arch.teacher[name].parameters())
                torch._foreach_mul_(teacher, momentum)
                torch._foreach_add_(teacher, student, alpha=1 - momentum)
        return {name: float(loss) for name, loss in losses.items()}, norms


def collated(global_crops: Tensor, local_crops: Tensor, masks: Tensor) -> dict[str, Any]:
    """What dinov2's collate function makes of these.

    Args:
        global_crops: float [2 B, 3, G, G], view-major.
        local_crops: float [L B, 3, l, l], view-major.
        masks: bool [2 B, N].
    """
    indices = masks.flatten().nonzero().flatten()
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    return {
        "collated_global_crops": global_crops,
        "collated_local_crops": local_crops,
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": weights,
        "upperbound": len(indices) + 2,  # dinov2 pads to the most that its strata allow
        "n_masked_patches": torch.full((1,), len(indices), dtype=torch.long),
    }


def parameters(modules: nn.ModuleDict) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters."""
    yield from modules.named_parameters()
