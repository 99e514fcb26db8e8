"""Gram (fallback)."""
from __future__ import annotations
import torch.nn.functional as F


def resize_tokens(tokens, a, b):
    c, _, d = tokens.shape
    return F.interpolate(tokens.transpose(1, 2).view(c, d, *a), size=b, mode="bicubic").flatten(2).transpose(1, 2)


def gram_loss(s, t):
    s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    return F.mse_loss(s @ s.transpose(1, 2), t @ t.transpose(1, 2))
