"""A training run that takes seconds: forty-eight made pictures, a two-block network."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import yaml
from PIL import Image

from training.config import TrainRecipe, lay_over
from training.data.tars import TarWriter

ROOT = Path(__file__).resolve().parents[2]


def picture(index: int, side_px: int = 64) -> bytes:
    """A JPEG of stripes whose direction, colour and width follow from its number."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:side_px, :side_px]
    angle, width = rng.uniform(0, np.pi), rng.uniform(3, 12)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / width)
    rgb = 128 + 60 * wave[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 12, (side_px, side_px, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tars(folder: Path, num_tars: int = 3, per_tar: int = 16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for tar in range(num_tars):
        writer = TarWriter(folder / f"{tar:03d}.tar")
        for row in range(per_tar):
            key = f"{tar * per_tar + row:09d}"
            writer.add(f"{key}.jpg", picture(tar * per_tar + row))
            writer.add(f"{key}.json", json.dumps({"label": row % 4}).encode())
        writer.close()


def values(tars: Path, run: Path, **changes) -> dict:
    head = {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16}
    base = {
        "name": "small",
        "run": str(run),
        "model": {
            "arch": "vit_tiny",
            "dim": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_px": 8,
            "image_px": 32,
            "layerscale": 0.5,
        },  # at 1e-5 all tokens begin equal, and neighbours are decided by rounding
        "views": {"global_px": 32, "local_px": 16, "num_locals": 2},
        "objective": {
            "dino": {"head": head},
            "ibot": {"head": head},
            "koleo": {"distributed": True},
            "temperature": {"warmup": 2},
        },
        "data": {"parts": {"made": {"kind": "tars", "location": f"{tars}/*.tar"}}, "batch_size": 8, "num_workers": 0},
        # eps: AdamW makes a whole step of the rounding of a gradient that is zero
        "optim": {"lr": 0.002, "lr_scaling": "none", "eps": 1e-4},
        "schedule": {"length": 8, "warmup": 2, "freeze_last_layer": 1},
        "parallel": {"threads": 1, "device": "cpu"},
        "checkpoint": {"every": 3},
    }
    return lay_over(base, changes)


def recipe(tars: Path, run: Path, **changes) -> TrainRecipe:
    return TrainRecipe.model_validate(values(tars, run, **changes))


def write_recipe(path: Path, tars: Path, run: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(values(tars, run, **changes)))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(path: Path, ranks: int = 1, *options: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "pipelines.cli", "train", str(path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return [sys.executable, *launcher, "-m", "pipelines.cli", "train", str(path)]


def run_cli(path: Path, ranks: int = 1, *options: str) -> str:
    done = subprocess.run(
        command(path, ranks, *options), env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_after(path: Path, log: Path, num_lines: int) -> None:
    """Start the run, and kill it with all its workers as soon as its log has so many lines."""
    process = subprocess.Popen(
        command(path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(steps_of(log)) < num_lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_a_rank_after(path: Path, log: Path, num_lines: int) -> None:
    """Start two ranks that may be restarted once, and kill the second as soon as the log has so many lines."""
    process = subprocess.Popen(
        command(path, 2, "--max-restarts=1"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 120
    while len(steps_of(log)) < num_lines:
        assert process.poll() is None, "it ended before a rank could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    ranks[0].kill()
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text.decode()


def steps_of(log: Path) -> list[dict]:
    if not log.exists():
        return []
    lines = []
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "dino" in record or "ibot" in record or "feature" in record:
            lines.append(record)
    return lines
