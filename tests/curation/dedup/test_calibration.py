"""Descriptors of low precision: those that see what they see in fp32 pass, those that overflow or collapse do not."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from curation.dedup.calibration import LEAST_SIMILARITY, MOST_RISE, deviation, open_calibrated
from curation.dedup.copydescriptor import DescriptorConfig, sscd_resnet50
from curation.dedup.describe import Describe, crops_of_installed_photographs
from training.config import ConfigError


class Net(torch.nn.Module):
    """Two convolutions; what lies between them is ``gain`` times as large, what comes out is not."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.Conv2d(8, 32, 5, stride=4)
        with torch.no_grad():
            self.first.weight *= gain
            self.first.bias *= gain
            self.second.weight /= gain
            self.second.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))).mean((2, 3))


def saved(model: torch.nn.Module, path: Path, **values: str) -> DescriptorConfig:
    torch.jit.save(torch.jit.script(model.eval()), str(path))
    return DescriptorConfig.model_validate({"name": f"sscd:{path}", **values})


def opened(config: DescriptorConfig):
    return open_calibrated(config, {}, crops_of_installed_photographs(0))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_healthy_model_passes_and_is_computed_in_that_precision(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    config = saved(Net(1.0), tmp_path / "net.pt", precision=precision)
    exact = opened(config.model_copy(update={"precision": "fp32"}))
    low = opened(config)
    for rgb in islice(crops_of_installed_photographs(1), 4):
        similarity = float(exact.vector(rgb) @ low.vector(rgb))
        assert similarity >= LEAST_SIMILARITY
        assert not np.array_equal(exact.vector(rgb), low.vector(rgb))


def test_a_model_whose_activations_overflow_is_refused_in_fp16_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = saved(Net(1e6), tmp_path / "net.pt", precision="fp16")
    with pytest.raises(ConfigError) as caught:
        opened(config)
    assert str(caught.value) == (
        "descriptor.precision: got 'fp16', in which sscd on cpu gives no finite numbers for 16 of 16 photographs; "
        "allowed with these weights: fp32, or bf16 if it passes"
    )
    for precision in ("bf16", "fp32"):
        opened(config.model_copy(update={"precision": precision}))


def test_the_stage_describes_nothing_with_a_model_that_is_refused(tmp_path: Path, memory_io: Any) -> None:
    """Neither rows nor pictures are there: it is refused before they are asked for."""
    torch.manual_seed(0)
    memory_io.put("fit_descriptor", 0, name=[], shape=[], data=[])
    config = saved(Net(1e6), tmp_path / "net.pt", precision="fp16")
    with pytest.raises(ConfigError, match=r"descriptor\.precision: got 'fp16'"):
        Describe(config).run(0, memory_io)


def test_the_torchvision_form_of_sscd_runs_in_low_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"backbone.{key}": value for key, value in sscd_resnet50(512).state_dict().items()}
    torch.save(state, tmp_path / "sscd.pt")
    config = DescriptorConfig.model_validate({"name": f"sscd:{tmp_path / 'sscd.pt'}", "precision": "bf16"})
    assert open_calibrated(config, {}, islice(crops_of_installed_photographs(0), 2)).dim == 512


def test_the_precision_is_part_of_the_model_only_where_it_is_low(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = saved(Net(1.0), tmp_path / "net.pt")
    values = [config.model_copy(update={"precision": name}).model_values() for name in ("fp32", "bf16", "fp16")]
    assert [one.get("precision") for one in values] == [None, "bf16", "fp16"]


def rows(num: int = 16, dim: int = 64, towards: float = 0.05) -> np.ndarray:
    found = np.random.default_rng(0).standard_normal((num, dim)).astype(np.float32)
    found[:, 0] += towards * np.sqrt(dim)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def moved(vectors: np.ndarray, by: float) -> np.ndarray:
    """All vectors a step towards one and the same direction."""
    found = vectors.copy()
    found[:, 0] += by
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_what_is_wrong_is_named() -> None:
    exact = rows()
    assert deviation(exact, exact) is None
    assert deviation(exact, moved(exact, 0.01)) is None
    broken = exact.copy()
    broken[3, 5] = np.inf
    assert deviation(exact, broken) == "gives no finite numbers for 1 of 16 photographs"
    collapsed = np.zeros_like(exact)
    collapsed[:, 0] = 1
    assert "tells photographs apart less: their mean similarity is 1.000, in fp32 0.0" in str(
        deviation(exact, collapsed)
    )
    turned = exact.copy()
    turned[2] = -turned[2]
    assert deviation(exact, turned) == (
        f"gives a vector with similarity -1.000 to its own in fp32, and {LEAST_SIMILARITY} is the least"
    )


def test_a_common_drift_is_a_collapse_though_each_vector_stays_near() -> None:
    exact = rows(towards=0.2)
    drifted = moved(exact, 0.12)
    assert (exact * drifted).sum(1).min() > LEAST_SIMILARITY
    assert f"and a rise by {MOST_RISE} is the most" in str(deviation(exact, drifted))
