"""What only a GPU can show of the trainer: the same numbers as on the CPU, by every path that is made for it."""

from typing import Any

import pytest
import torch

from tests.training import small_training as small
from training.config import ModelConfig
from training.data.index import Index
from training.data.loader import Loader
from training.models.vit import VisionTransformer
from training.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    small.write_tars(folder)
    return folder


def losses(tars, run, **changes: Any) -> list[float]:
    train(small.recipe(tars, run, **changes), lambda line: None)
    return [record["dino"] for record in small.steps_of(run / "pretrain" / "log.jsonl")]


@pytest.fixture(scope="module")
def on_cpu(tars, tmp_path_factory):
    return losses(tars, tmp_path_factory.mktemp("cpu"))


@pytest.mark.parametrize(
    ("parallel", "relative"),
    [
        ({"precision": "fp32"}, 1e-3),
        ({"precision": "bf16"}, 1e-2),
        ({"precision": "bf16", "attention": "varlen"}, 1e-2),
        ({"precision": "bf16", "compile": True}, 1e-2),
        ({"precision": "bf16", "activation_checkpointing": True}, 1e-2),
        ({"precision": "bf16", "mode": "fsdp"}, 1e-2),
    ],
)
def test_losses_are_those_of_the_cpu(tars, tmp_path, on_cpu, parallel: dict[str, Any], relative: float):
    found = losses(tars, tmp_path / "run", parallel={"device": "cuda"} | parallel)
    assert found == pytest.approx(on_cpu, rel=relative)


def test_photometric_changes_on_the_device_are_those_of_the_workers(tars, tmp_path, on_cpu):
    found = losses(tars, tmp_path / "run", views={"on_device": True}, parallel={"device": "cuda", "precision": "fp32"})
    assert found == pytest.approx(on_cpu, rel=1e-2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_page_locked_memory(tars, tmp_path, num_workers: int):
    resolved = small.recipe(tars, tmp_path, data={"num_workers": num_workers}).resolved("pretrain")
    index = Index.open(resolved.data)
    with Loader(resolved, index, rank=0, world=1, start_step=0, device=torch.device("cuda", 0)) as loader:
        assert all(batch.global_crops.is_pinned() for batch in loader)


def test_varlen_attention_is_that_of_each_group_alone():
    config = ModelConfig(dim=64, depth=2, num_heads=2, patch_px=8, image_px=48)
    model = VisionTransformer(config, attention="varlen").cuda().eval()
    plain = VisionTransformer(config, attention="sdpa").cuda().eval()
    plain.load_state_dict(model.state_dict())
    crops = [torch.randn(4, 3, 48, 48, device="cuda"), torch.randn(8, 3, 24, 24, device="cuda")]
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for one, other in zip(model(crops), plain(crops), strict=True):
            torch.testing.assert_close(one.cls, other.cls, atol=3e-2, rtol=3e-2)
            torch.testing.assert_close(one.patches, other.patches, atol=3e-2, rtol=3e-2)
