"""Runs the training step of facebookresearch/dinov3 on one CPU, from a checkout that lies elsewhere.

Its licence is not an open one: it is run through its public names, and nothing of it is taken over. Not compiled, no
FSDP, gloo with one rank, ``Tensor.cuda`` does nothing; schedules are constant, AdamW and the parameter groups its own.
It needs termcolor, omegaconf, torchmetrics, submitit and scikit-learn besides (see peers_dinov2.py).
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor, nn

ARCH = "vit_of_ours"


def prepare(path: Path) -> None:
    """Make the checkout importable and runnable on a CPU."""
    if not (path / "dinov3" / "train").is_dir():
        sys.exit(f"no checkout of facebookresearch/dinov3 at {path}")
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(path))
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.cuda.empty_cache = lambda: None
    nn.Module.compile = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Dinov3:
    """dinov3's student, teacher, losses and optimiser.

    Args:
        dim: of the embedding; heads have 64.
        depth: blocks.
        patch_px: side of a patch.
        pixels: sides of global and of local crops.
        num_locals: local crops a picture.
        head: prototypes, hidden and bottleneck dim of both heads.
        batch: pictures a step.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        patch_px: int,
        pixels: tuple[int, int],
        num_locals: int,
        head: tuple[int, int, int],
        batch: int,
    ) -> None:
        from dinov3.configs import get_default_config
        from dinov3.models import vision_transformer
        from dinov3.train.ssl_meta_arch import SSLMetaArch
        from omegaconf import OmegaConf

        vars(vision_transformer)[ARCH] = partial(
            vision_transformer.DinoVisionTransformer, embed_dim=dim, depth=depth, num_heads=dim // 64
        )
        heads = dict(zip(("head_n_prototypes", "head_hidden_dim", "head_bottleneck_dim"), head, strict=True))
        values = {
            "MODEL": {"DEVICE": "cpu"},
            "compute_precision": {"param_dtype": "fp32"},
            "dino": heads,
            "ibot": heads,
            "train": {"batch_size_per_gpu": batch, "compile": False},
            "student": {"arch": ARCH, "patch_size": patch_px, "drop_path_rate": 0.0, "pos_embed_rope_dtype": "fp32"},
            "crops": {
                "global_crops_size": pixels[0],
                "local_crops_size": pixels[1],
                "local_crops_number": num_locals,
            },
        }
        config = OmegaConf.merge(get_default_config(), OmegaConf.create(values))
        with torch.device("meta"):
            self.arch = SSLMetaArch(config)
        self.arch.to_empty(device="cpu")
        self.arch.init_weights()
        self.arch.train()
        self.optimizer = torch.optim.AdamW(self.arch.get_params_groups(), lr=1e-4)
        self.batch = batch

    def step(self, global_crops: Tensor, local_crops: Tensor, masks: Tensor, number: int) -> float:
        """One step on crops [2 B, 3, G, G], [L B, 3, l, l], view-major, and masks [2 B, N]; the loss."""
        indices = masks.flatten().nonzero().flatten()
        images = {
            "collated_global_crops": global_crops,
            "collated_local_crops": local_crops,
            "collated_masks": masks,
            "mask_indices_list": indices,
            "masks_weight": (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks],
            "upperbound": len(indices) + 2,
            "n_masked_patches": torch.full((1,), len(indices), dtype=torch.long),
            "global_batch_size": self.batch,
        }
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.arch.forward_backward(images, teacher_temp=0.04, iteration=number)
        for module in self.arch.student.values():
            nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        self.optimizer.step()
        self.arch.update_ema(0.994)
        return float(loss)
