"""Losses and assignments as facebookresearch/dinov2 computes them, for tests/training/losses.

python tests/golden/make_losses.py --dinov2 CHECKOUT
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

OUT = Path(__file__).parent / "losses.npz"
B, L, N, K, Z, D = 4, 3, 9, 24, 8, 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dinov2", required=True)
    sys.path.insert(0, parser.parse_args().dinov2)
    from dinov2.loss.dino_clstoken_loss import DINOLoss
    from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
    from dinov2.loss.koleo_loss import KoLeoLoss

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    out: dict[str, np.ndarray] = {}
    weight = torch.nn.functional.normalize(torch.randn(K, Z), dim=-1)
    z = torch.nn.functional.normalize(torch.randn((2 + L) * B, Z), dim=-1).requires_grad_()
    teacher = torch.randn(2 * B, K) * 0.3
    dino = DINOLoss(K)
    targets = dino.sinkhorn_knopp_teacher(teacher, teacher_temp=0.05)
    logits = z @ weight.T
    halves = targets.view(2, B, K)
    local = dino(student_output_list=logits[2 * B :].chunk(L), teacher_out_softmaxed_centered_list=halves)
    swapped = torch.cat([halves[1], halves[0]])
    global_ = dino([logits[: 2 * B]], [swapped])
    terms = 2 + 2 * L
    local, global_ = local / terms, global_ * 2 / terms
    (local + global_).backward()
    out |= {"dino_weight": weight, "dino_z": z, "dino_teacher": teacher, "dino_targets": targets}
    out |= {"dino_global": global_, "dino_local": local, "dino_gradient": z.grad}

    masks = torch.rand(2 * B, N) < 0.4
    masks[1] = False
    num_masked = int(masks.sum())
    patches = (torch.randn(num_masked, K) * 0.3).requires_grad_()
    patch_teacher = torch.randn(num_masked, K) * 0.3
    ibot = iBOTPatchLoss(K)
    patch_targets = ibot.sinkhorn_knopp_teacher(patch_teacher, 0.05, n_masked_patches_tensor=torch.tensor([num_masked]))
    counts = masks.sum(1)
    loss = ibot.forward_masked(
        patches,
        patch_targets,
        student_masks_flat=masks,
        n_masked_patches=num_masked,
        masks_weight=(1 / counts.clamp(min=1))[:, None].expand_as(masks)[masks],
    )
    loss.backward()
    out |= {"ibot_masks": masks, "ibot_student": patches, "ibot_teacher": patch_teacher, "ibot_targets": patch_targets}
    out |= {"ibot_loss": loss, "ibot_gradient": patches.grad}

    x = torch.randn(10, D, requires_grad=True)
    spread = KoLeoLoss()(x)
    spread.backward()
    out |= {"koleo_x": x, "koleo_loss": spread, "koleo_gradient": x.grad}

    steps, cls_rows, patch_rows = torch.randn(5, 6, K), [], []
    for step in steps:
        cls_rows.append(dino.softmax_center_teacher(step, 0.06))
        dino.update_center(step)
        patch_rows.append(ibot.softmax_center_teacher(step[None], 0.06)[0])
        ibot.update_center(step[None])
    dino.apply_center_update()
    out |= {"center_steps": steps, "center_cls": torch.stack(cls_rows), "center_patch": torch.stack(patch_rows)}
    out["center_end"] = dino.center
    np.savez_compressed(OUT, **{name: value.detach().numpy() for name, value in out.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
