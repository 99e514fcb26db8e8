"""The models that `lvd curate` names before work."""

import hashlib
from pathlib import Path

import pytest

from curation.safety.detector import has_cuda
from pipelines.curate import CurateRecipe, build_stages
from pipelines.drive import PlanLine
from pipelines.models import describe_models
from training.config import ConfigError


def recipe(tmp_path: Path, **more: object) -> CurateRecipe:
    source = {"kind": "folder", "location": str(tmp_path)}
    values = {"name": "x", "pool": str(tmp_path / "pool"), "run": str(tmp_path / "run"), "sources": {"a": source}}
    return CurateRecipe.model_validate(values | more)


def lines(*, undone: tuple[str, ...], unseen: tuple[str, ...] = ()) -> list[PlanLine]:
    names = ("look", "describe", "embed")
    return [
        PlanLine(stage=name, num_done=1, num_undone=int(name in undone), why={}, known=name not in unseen)
        for name in names
    ]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    import timm
    from safetensors.torch import save_file

    found = {name: tmp_path / name for name in ("v.safetensors", "sscd.pt", "yunet.onnx")}
    save_file(timm.create_model("test_vit").state_dict(), str(found["v.safetensors"]))
    found["sscd.pt"].write_bytes(b"s" * 1234)
    found["yunet.onnx"].write_bytes(b"y")
    return found


def test_each_model_is_a_line_with_its_file_licence_and_shape(tmp_path, files):
    made = recipe(
        tmp_path,
        look={"yunet": str(files["yunet.onnx"]), "face_input_px": [320, 640]},
        descriptor={"name": f"sscd:{files['sscd.pt']}"},
        embed={"name": "timm:test_vit", "weights": str(files["v.safetensors"]), "pooling": "cls_mean"}
        | {"size_px": 64, "precision": "bf16"},
    )
    shown = list(describe_models(build_stages(made), lines(undone=("look",), unseen=("describe", "embed")), "cuda"))
    assert shown[0] == "models"
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in shown[1:]]
    assert [row[:5] for row in cells] == [
        ["look", "nudenet", "320 and 640 px", "fp32 cuda" if has_cuda() else "fp32 cpu", "AGPL-3.0"],
        ["look", "yunet", "whole pictures", "fp32 cpu", "not stated"],
        ["describe", "sscd", "288 px", "fp32 cuda", "not stated"],
        ["embed", "timm:test_vit", "64 px -> 128", "bf16 cuda", "apache-2.0"],
    ]
    digest = hashlib.sha256(files["sscd.pt"].read_bytes()).hexdigest()[:8]
    assert cells[2][5] == f"{files['sscd.pt']} (1.2 kB, sha256 {digest})"
    assert len({line.index("fp32") if "fp32" in line else line.index("bf16") for line in shown[1:]}) == 1  # aligned


def test_models_without_work_are_not_named(tmp_path):
    stages = build_stages(recipe(tmp_path))
    assert list(describe_models(stages, lines(undone=()), "cpu")) == []
    assert list(describe_models(stages, lines(undone=("embed",)), "cuda")) == [
        "models",
        "  embed  hog-thumb  64 px -> 320  fp32 cpu  -  no weights",
    ]


def test_what_a_library_does_not_have_is_said_before_work(tmp_path, files):
    made = recipe(tmp_path, embed={"name": "timm:no_such", "weights": str(files["v.safetensors"])})
    with pytest.raises(ConfigError, match=r"embed.name: got 'timm:no_such'; timm .* has no model 'no_such'"):
        list(describe_models(build_stages(made), lines(undone=("embed",)), "cpu"))
    made = recipe(tmp_path, embed={"name": f"checkpoint:{files['v.safetensors']}"})
    with pytest.raises(ConfigError, match=r"embed.name: 'checkpoint:.*' cannot be opened with .*names no architecture"):
        list(describe_models(build_stages(made), lines(undone=("embed",)), "cpu"))
