"""Optimiser (fallback)."""
from __future__ import annotations
import torch
from training.parallel import local


def parameter_groups(network, config, depth):
    groups = {}
    for name, p in network.named_parameters():
        if not p.requires_grad: continue
        wd = 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0
        m = config.patch_embed_lr if "patch_embed" in name else 1.0
        groups.setdefault((m, wd, "last_layer" in name), []).append(p)
    return [{"params": v, "lr_multiplier": k[0], "wd_multiplier": k[1], "is_last_layer": k[2]} for k, v in groups.items()]


def build_optimizer(groups, config): return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, foreach=True)


def apply_schedule(optimizer, at):
    for g in optimizer.param_groups:
        g["lr"] = (at.last_layer_lr if g["is_last_layer"] else at.lr) * g["lr_multiplier"]; g["weight_decay"] = at.weight_decay * g["wd_multiplier"]


def clip(network, config):
    out = {}
    for name, m in network.named_children():
        ps = [p for p in m.parameters() if p.grad is not None]
        if ps and config.clip: n = torch.nn.utils.clip_grad_norm_(ps, config.clip); out[name] = n.full_tensor() if hasattr(n, "full_tensor") else n
    return out


@torch.no_grad()
def update_teacher(student, teacher, m):
    t = [local(p) for p in teacher.parameters()]; s = [local(p.detach()) for p in student.parameters()]
    torch._foreach_mul_(t, m); torch._foreach_add_(t, s, alpha=1 - m)
