"""Conversion (fallback)."""
from __future__ import annotations


class Report(str):
    pass


def load_backbone(model, state):
    own = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")} or state
    model.load_state_dict(own)
    return Report("loaded")


def timm_architecture(c):
    d, depth, h = c.shape
    return "vit_small_patch16_224", {"embed_dim": d, "depth": depth, "num_heads": h, "patch_size": c.patch_px, "img_size": c.image_px, "init_values": c.layerscale, "act_layer": c.activation, "mlp_ratio": c.mlp_ratio}


def backbone_to_timm(s, c): return {k: v for k, v in s.items() if k != "mask_token"}


def backbone_to_hf(s, c): raise NotImplementedError
