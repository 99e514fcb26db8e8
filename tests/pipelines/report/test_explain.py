from typing import Any

import pytest

from curation.export.export import ExportConfig
from pipelines.report.explain import explain
from training.config import ConfigError

FIRST, SECOND = 3_000_000_000_000, 3_000_001_000_000


@pytest.fixture
def connection(small_run: Any) -> Any:
    small_run.export(ExportConfig(samples_per_tar=4))
    return small_run.connect()


def test_life_of_a_chosen_picture(connection: Any):
    text = explain(connection, str(FIRST))
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == f"image {FIRST}"
    for stage in ("screened", "fetched", "safety", "near", "duplicates", "leakage", "selection"):
        assert any(line.split() == [stage, "kept"] for line in lines)
    assert f"it stands for {FIRST + 4}" in text
    assert (
        "for the set dogs, by query image 2000000000000 (http://h0.test/dogs/2000000000000.jpg), similarity 0.5000"
        in text
    )
    assert "1 faces (blurred)" in text
    assert "tars/00000000" in text
    assert "faces blurred" in text
    assert lines[-1].split(maxsplit=1) == ["end", "in the set"]


def test_life_of_dropped_pictures(connection: Any):
    near = explain(connection, str(FIRST + 4))
    assert "dropped: near_duplicate" in near
    assert f"image {FIRST} stands for it (http://h0.test/web/{FIRST}.jpg)" in near
    copy = explain(connection, str(FIRST + 5))
    assert "dropped: copy  (score 0.7, threshold 0.6)" in copy
    leak = explain(connection, str(SECOND + 1))
    assert "most like image 1 of benchmark bench" in leak
    assert leak.splitlines()[-1].split() == ["end", "leakage/leak"]
    assert f"image {FIRST} has this address first" in explain(connection, str(SECOND + 4))
    assert "http_4xx, status 404" in explain(connection, str(FIRST + 2))


def test_references_and_as_is_pictures(connection: Any):
    assert "a reference" in explain(connection, "0")
    assert "for the set flowers" in explain(connection, "1000000000000")


def test_by_address(connection: Any):
    assert explain(connection, f"http://h0.test/web/{FIRST}.jpg") == explain(connection, str(FIRST))


@pytest.mark.parametrize("name", ["12345", "http://nowhere.test/", "9" * 40, ""])
def test_unknown_pictures_are_told_so(connection: Any, name: str):
    with pytest.raises(ConfigError, match="is not in this run"):
        explain(connection, name)
