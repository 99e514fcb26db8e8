"""Passes of a frozen backbone."""

import numpy as np
import pytest
import torch

from training.config import ModelConfig, ViewConfig
from training.eval.features import extract, read_out
from training.models.vit import VisionTransformer

MODEL = ModelConfig(
    arch="vit_tiny", dim=16, depth=3, num_heads=2, patch_px=4, image_px=8, drop_path=0.5, layerscale=0.5
)
VIEWS = ViewConfig()


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(MODEL)


@pytest.fixture(scope="module")
def squares() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8))


def normalised(squares) -> torch.Tensor:
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255
    return (images - torch.tensor(VIEWS.mean)[:, None, None]) / torch.tensor(VIEWS.std)[:, None, None]


@pytest.mark.parametrize("batch_size", [2, 100])
@pytest.mark.parametrize("readout", ["cls", "mean", "cls_mean"])
def test_readouts_are_those_tokens_of_the_normalised_pictures(backbone, squares, readout, batch_size):
    backbone.train()
    features = read_out(extract(backbone, iter(squares), views=VIEWS, batch_size=batch_size), 16, readout)
    assert backbone.training, "left as it was, and measured without stochastic depth"
    with torch.no_grad():
        tokens = backbone.eval()([normalised(squares)])[0]
    cls, mean = tokens.cls, tokens.patches.mean(1)
    joined = torch.cat([cls / cls.norm(dim=-1, keepdim=True), mean / mean.norm(dim=-1, keepdim=True)], -1)
    expected = {"cls": cls, "mean": mean, "cls_mean": joined}[readout]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_last_blocks_are_read_in_order_with_the_mean_patch_behind(backbone, squares):
    features = extract(backbone, squares, views=VIEWS, batch_size=3, num_blocks=2)
    with torch.no_grad():
        blocks = backbone.eval().intermediate(normalised(squares), 2)
    expected = torch.cat([blocks[0].cls, blocks[1].cls, blocks[1].patches.mean(1)], -1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_half_precision_is_close_to_full(backbone, squares):
    full, half = (
        extract(backbone, squares, views=VIEWS, batch_size=8, precision=precision) for precision in ("fp32", "bf16")
    )
    assert not torch.equal(full, half)
    assert torch.nn.functional.cosine_similarity(full, half).min() > 0.999


def test_no_picture_at_all_is_an_error(backbone):
    with pytest.raises(ValueError, match="got none"):
        extract(backbone, [], views=VIEWS, batch_size=3)
