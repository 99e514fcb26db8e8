"""A second opinion by an open_clip model and a head, both made here: it is asked once, and thresholds judge it."""

import json
from pathlib import Path

import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Weights of an open_clip model of a few layers, and a head on its 16 features."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    tower = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    (folder / "lvd-opinion.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    torch.save(open_clip.create_model("lvd-opinion").state_dict(), folder / "clip.pt")
    layers = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    torch.save(layers.state_dict(), folder / "head.pt")
    return {"weights": str(folder / "clip.pt"), "head": str(folder / "head.pt")}


def table(folder: Path, root: str, name: str) -> pd.DataFrame:
    return pd.concat(pd.read_parquet(path) for path in sorted((folder / root / name).rglob("*.parquet")))


def test_it_is_asked_once_and_thresholds_judge(lab, undisturbed, files, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy", without=["pool/opinions"])
    asked = ["opinion.name=open_clip:lvd-opinion/mine", *(f"opinion.{key}={path}" for key, path in files.items())]
    lab.curate(folder, *asked, "safety.opinion_drop=1", until="safety")
    found = table(folder, "pool", "opinions").merge(table(folder, "pool", "hashes")[["image_id", "ok"]], on="image_id")
    sources = table(folder, "pool", "sources").set_index("source_id")["role"]
    roles = (found.image_id // 10**12).map(sources)
    assert found.score.notna().equals(found.ok & (roles == "pool"))
    assert found.score.nunique() > 50

    middle = float(found.score.median())
    outcome = lab.curate(folder, *asked, f"safety.opinion_drop={middle}", until="safety")
    assert set(outcome.summary.costs) == {"safety"}
    judged = table(folder, "run", "safety").merge(found, on="image_id")
    named = judged[judged.reason == "nsfw_opinion"]
    assert len(named) > 50
    assert (named.score_y >= middle).all()
    assert named.score_x.to_numpy() == pytest.approx(named.score_y.to_numpy())
    others = judged[judged.reason.isna() & judged.score_y.notna()]
    assert (others.score_y < middle).all()
    assert lab.curate(folder, *asked, f"safety.opinion_drop={middle}", until="safety").summary.num_jobs == 0
