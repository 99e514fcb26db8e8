"""Fixtures for all tests: the folder of shared pictures, and one built sample web with an undisturbed run on it."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures beside the checkout; they are no part of the project."""
    folder = Path(os.environ.get("LVD_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the shared pictures are not at {folder}; name their folder in LVD_SHARED_DATA")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file stay in one process, so that what they share is made once (pytest -n 2 --dist loadgroup)."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path)))
