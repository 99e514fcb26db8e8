"""The head of the second opinion: what torch gives, whoever stands beside it, and files that are none."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from curation.safety.opinion import OpinionConfig, SecondOpinion, open_head
from pipelines.curate import CurateRecipe
from pipelines.recipe import load_recipe
from training.config import ConfigError

torch = pytest.importorskip("torch")


def layers(*sizes: int) -> "torch.nn.Sequential":
    torch.manual_seed(0)
    found = []
    for before, after in pairwise(sizes):
        found += [torch.nn.Linear(before, after), torch.nn.ReLU(), torch.nn.Dropout()]
    return torch.nn.Sequential(*found[:-2]).eval()


def config(path: Path, **values: object) -> OpinionConfig:
    return OpinionConfig(name="open_clip:ViT-B-32/openai", head=str(path), **values)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("unit_features", [True, False])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_it_gives_what_torch_gives(tmp_path: Path, activation: str, unit_features: bool, suffix: str) -> None:
    from safetensors.torch import save_file

    model = layers(24, 16, 8, 1)
    state = {f"layers.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / f"head.{suffix}"
    (torch.save if suffix == "pt" else save_file)(state, str(path))
    features = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    shown = torch.from_numpy(features)
    with torch.inference_mode():
        wanted = model(torch.nn.functional.normalize(shown) if unit_features else shown)[:, 0]
    wanted = torch.sigmoid(wanted) if activation == "sigmoid" else wanted
    head = open_head(config(path, activation=activation, unit_features=unit_features))
    scores = head.scores(features)
    assert (head.dim, scores.dtype) == (24, np.float32)
    np.testing.assert_allclose(scores, wanted.numpy(), atol=1e-5)
    assert np.array_equal(head.scores(features[3:]), scores[3:])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "it ends in 0 numbers"),
        ({"0.weight": (4, 8), "0.bias": (4,)}, "it ends in 4 numbers"),
        ({"0.weight": (4, 8), "2.weight": (1, 5)}, r"2.weight is \[1, 5\], behind 4"),
        ({"0.weight": (1, 8), "0.bias": (2,)}, r"0.bias is \[2\]"),
        ({"fc.weight": (1, 8)}, "fc.weight is neither"),
    ],
)
def test_a_file_that_is_no_head_is_one_line(tmp_path: Path, state: dict, message: str) -> None:
    path = tmp_path / "head.pt"
    torch.save({name: torch.zeros(shape) for name, shape in state.items()}, path)
    with pytest.raises(ConfigError, match=rf"opinion.head: '.*' is no state dict of linear layers \(.*{message}"):
        open_head(config(path))
    path.write_bytes(b"no file of torch")
    with pytest.raises(ConfigError, match=r"opinion.head: .* is no state dict"):
        open_head(config(path))


def test_missing_files_are_named_before_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"opinion.name: got 'open_clip:ViT-B-32', allowed: none, timm:NAME"):
        SecondOpinion(OpinionConfig(name="open_clip:ViT-B-32", head="x")).preflight()
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"")
    stage = SecondOpinion(config(tmp_path / "head.pt", weights=str(weights)))
    with pytest.raises(ConfigError, match=r"opinion.head: got .*head.pt', which is no file; give a state dict"):
        stage.preflight()
    SecondOpinion(OpinionConfig()).preflight()


def test_thresholds_and_an_opinion_belong_together() -> None:
    asked = ["opinion.name=open_clip:ViT-B-32/openai", "opinion.head=head.pt"]
    with pytest.raises(ConfigError, match=r"nothing is made of it: give safety.opinion_drop"):
        load_recipe(CurateRecipe, "smoke", asked)
    with pytest.raises(ConfigError, match=r"opinion.name is none"):
        load_recipe(CurateRecipe, "smoke", ["safety.opinion_clear=0.2"])
    assert load_recipe(CurateRecipe, "smoke", [*asked, "safety.opinion_drop=0.9"]).opinion.is_asked
