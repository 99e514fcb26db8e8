"""Imports point one way, and only one file knows Ray."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "training": {"training"},
    "curation": {"curation", "training"},
    "pipelines": {"pipelines", "curation", "training"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def test_imports_point_from_pipelines_to_curation_to_training():
    for package, allowed in ALLOWED.items():
        files = list((ROOT / package).rglob("*.py"))
        assert files
        for path in files:
            ours = {name.split(".")[0] for name in imported(path)} & set(ALLOWED)
            assert ours <= allowed, f"{path} imports {ours - allowed}"


def test_only_the_runner_imports_ray():
    users = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported(path))
    }
    assert users == {"pipelines/runner.py"}


def test_every_stage_is_in_the_architecture_page():
    from pipelines.curate import CurateRecipe, build_stages
    from pipelines.recipe import load_recipe

    page = (ROOT / "docs" / "architecture.md").read_text()
    for stage in build_stages(load_recipe(CurateRecipe, "smoke")):
        assert stage.name in page, stage.name
        for table in stage.writes:
            assert f"`{table}`" in page or f"/{table}`" in page, table
