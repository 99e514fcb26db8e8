"""Blocks: stochastic depth, feed-forward networks, attentions."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked

from tests.training.models.golden import MADE, config_of, golden
from training.config import ConfigError, ModelConfig
from training.models.block import Attention, Block, SwiGlu, hidden_dim
from training.models.vit import VisionTransformer


def test_stochastic_depth_is_that_of_dinov2():
    model = VisionTransformer(config_of("plain", drop_path=0.3))
    MADE["fill"](model, "plain")
    torch.manual_seed(0)
    dropped = model.blocks[0].train()([MADE["noise"]("dropped", 10, 5, MADE["DIM"])])[0]
    torch.testing.assert_close(dropped, golden("dropped"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("drop_path", "num", "num_kept"), [(0.3, 10, 7), (0.4, 4, 2), (0.9, 3, 1), (0.5, 1, 1)])
def test_each_half_changes_a_subset_of_crops_by_a_scaled_residual(drop_path: float, num: int, num_kept: int):
    block = Block(ModelConfig(dim=8, depth=1, num_heads=2, drop_path=drop_path, layerscale=1.0), "auto")
    torch.nn.init.zeros_(block.ls2.gamma)
    group = torch.randn(num, 3, 8)
    change = block([group])[0] - group
    full = block.eval()([group])[0] - group
    is_changed = change.flatten(1).any(1)
    assert is_changed.sum() == num_kept
    torch.testing.assert_close(change[is_changed], full[is_changed] * num / num_kept, atol=1e-5, rtol=1e-5)


def test_subsets_of_groups_and_halves_are_drawn_apart():
    block = Block(ModelConfig(dim=8, depth=1, num_heads=2, drop_path=0.5, layerscale=1.0), "auto")
    seen = set()
    for gamma in (block.ls1.gamma, block.ls2.gamma):
        torch.manual_seed(1)
        torch.nn.init.ones_(block.ls1.gamma)
        torch.nn.init.ones_(block.ls2.gamma)
        torch.nn.init.zeros_(gamma)
        groups = [torch.randn(16, 3, 8), torch.randn(16, 2, 8)]
        for group, out in zip(groups, block(groups), strict=True):
            seen.add(tuple((out - group).flatten(1).any(1).tolist()))
    assert len(seen) == 4


def test_stochastic_depth_leaves_the_mean_where_it_was():
    block = Block(ModelConfig(dim=8, depth=1, num_heads=2, drop_path=0.4, layerscale=1.0), "auto")
    torch.nn.init.zeros_(block.ls2.gamma)
    group = torch.randn(5, 3, 8)
    with torch.no_grad():
        mean = torch.stack([block([group])[0] - group for _ in range(3000)]).mean(0)
        full = block.eval()([group])[0] - group
    torch.testing.assert_close(mean, full, atol=0.1 * full.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("dim", "ratio", "hidden"), [(1536, 4.0, 4096), (384, 4.0, 1024), (24, 4.0, 64), (20, 2.5, 40)]
)
def test_hidden_dim_of_swiglu_is_two_thirds_rounded_up_to_eight(dim: int, ratio: float, hidden: int):
    assert hidden_dim(ModelConfig(dim=dim, num_heads=2, ffn="swiglu", mlp_ratio=ratio)) == hidden


def test_swiglu_is_that_of_timm():
    ours, theirs = SwiGlu(16, 24), SwiGLUPacked(16, 48)
    theirs.fc1.load_state_dict(ours.w12.state_dict())
    theirs.fc2.load_state_dict(ours.w3.state_dict())
    rows = torch.randn(5, 16)
    torch.testing.assert_close(ours(rows), theirs(rows), atol=1e-6, rtol=0)


def test_attention_looks_at_its_own_crop_only():
    attention = Attention(8, 2, "auto")
    crops = torch.randn(3, 4, 8)
    changed = crops.clone()
    changed[1] += 1
    before, after = (attention(each.flatten(0, 1), [(3, 4)]).view(3, 4, 8) for each in (crops, changed))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_softmax_of_plain_attention_is_in_full_precision_under_autocast():
    attention = Attention(8, 1, "plain")
    rows = 3 * torch.randn(300, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(rows, [(1, 300)])
        query, key, value = attention.qkv(rows).chunk(3, dim=-1)
        shares = F.softmax(((query * 8**-0.5) @ key.T).float(), dim=-1)
        assert torch.equal(out, attention.proj(shares.bfloat16() @ value))


def test_attention_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match="attention: got 'fast'; allowed: auto, sdpa, plain, varlen"):
        Attention(8, 2, "fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="varlen attention is there")
def test_varlen_attention_is_refused_without_a_gpu():
    with pytest.raises(ConfigError, match="got 'varlen', which needs a CUDA device; allowed here: auto, sdpa, plain"):
        VisionTransformer(config_of("plain"), attention="varlen")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention needs a GPU")
def test_varlen_attention_is_that_per_group():
    rows = torch.randn(3 * 5 + 2 * 7, 64, device="cuda")
    attention = Attention(64, 2, "varlen").cuda()
    sizes = [(3, 5), (2, 7)]
    with torch.autocast("cuda", torch.bfloat16):
        packed = attention(rows, sizes)
        attention.kind = "sdpa"
        torch.testing.assert_close(packed, attention(rows, sizes), atol=2e-2, rtol=0)
