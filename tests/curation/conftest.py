import runpy
from pathlib import Path
from typing import Any

import pytest

BUILD = runpy.run_path(str(Path(__file__).parents[1] / "small_run.py"))["build"]


@pytest.fixture
def small_run(tmp_path: Path) -> Any:
    """Pool and run of hand-made tables with real pictures, all verdicts done, nothing exported: see small_run.py."""
    return BUILD(tmp_path)
