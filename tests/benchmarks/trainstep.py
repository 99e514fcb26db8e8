"""One training step, ours beside dinov2's (and dinov3's), on one CPU thread: speed, peak memory, and what bf16 gains.

    PYTHONPATH=PACKAGES make bench NAME=trainstep ARGS="--dinov2 PATH [--dinov3 PATH]"

PACKAGES: what the peers need besides; peers_dinov2.py and peers_dinov3.py name it and say how they are run. All
sides get networks of one shape, and the same crops and masks, collated beforehand; dinov2 also the same weights. fp32,
no stochastic depth. Rows:

    speed K=4,096     CPU seconds of a step; sides take turns; ratio of medians, peer / ours
    memory K=65,536   high-water mark of resident memory of a fresh process each; ours / dinov2
    bf16              CPU seconds of a step in fp32 / in bf16, both ours; largest difference between their losses

Prints a row each, writes a JSON, and ends with one line: the speed against dinov2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.config import Resolved, TrainRecipe
from training.data.collate import Batch
from training.models.network import Network
from training.objective import Objective
from training.parallel import World
from training.schedule import Schedules
from training.step import TrainStep

HERE = Path(__file__).resolve()
PATCH_PX, LOCALS, HIDDEN, BOTTLENECK = 14, 8, 2048, 256
SPEED_GOAL, MEMORY_GOAL, BF16_GOAL, BF16_LOSS_GOAL = 1.0, 0.8, 1.5, 0.01
Crops = tuple[Tensor, Tensor, Tensor]


class Side(Protocol):
    """Somebody's training step."""

    def step(self, number: int, shown: Crops) -> float:
        """Make a step; the loss: DINO + iBOT + 0.1 KoLeo."""


def crops(options: argparse.Namespace, number: int, batch: int) -> Crops:
    """Of one step: global crops [2 B, 3, G, G] and locals [L B, 3, l, l], view-major; masks bool [2 B, N]."""
    draw = torch.Generator().manual_seed(number)
    sides = (options.global_px, options.local_px)
    colour = torch.randn(1, batch, 3, 1, 1, generator=draw)
    shown = [
        (torch.randn(views, batch, 3, side, side, generator=draw) + colour).flatten(0, 1)
        for views, side in zip((2, LOCALS), sides, strict=True)
    ]
    num_patches = (options.global_px // PATCH_PX) ** 2
    edges = torch.linspace(0.1, 0.5, batch + 1)
    ratios = edges[:-1] + torch.rand(batch, generator=draw) * (edges[1:] - edges[:-1])
    counts = torch.cat([(ratios * num_patches).long(), torch.zeros(batch, dtype=torch.long)])
    counts = counts[torch.randperm(2 * batch, generator=draw)]
    order = torch.rand(2 * batch, num_patches, generator=draw).argsort(1).argsort(1)
    return shown[0], shown[1], order < counts[:, None]


# Sides


def resolved(options: argparse.Namespace, num_prototypes: int, batch: int, precision: str) -> Resolved:
    """The run in our words."""
    head = {"num_prototypes": num_prototypes, "hidden_dim": HIDDEN, "bottleneck_dim": BOTTLENECK}
    recipe = {
        "name": "trainstep",
        "run": "unused",
        "preset": "dinov2-released",
        "model": {
            "dim": options.dim,
            "depth": options.depth,
            "num_heads": options.dim // 64,
            "patch_px": PATCH_PX,
            "image_px": options.global_px,
        },
        "views": {"global_px": options.global_px, "local_px": options.local_px, "num_locals": LOCALS},
        "objective": {"dino": {"head": head}, "ibot": {"head": head}, "temperature": {"warmup": 300}},
        "data": {"parts": {"all": {"kind": "folder", "location": "unused"}}, "batch_size": batch},
        "optim": {"lr": 0.004, "weight_decay": [0.04, 0.4], "layer_decay": 0.9},
        "schedule": {"length": 1000, "warmup": 100, "freeze_last_layer": 0},
        "parallel": {"device": "cpu", "precision": precision, "threads": 1},
    }
    return TrainRecipe.model_validate(recipe).resolved("pretrain")


class Ours:
    """The step of this project."""

    def __init__(
        self, options: argparse.Namespace, *, num_prototypes: int, batch: int, precision: str = "fp32"
    ) -> None:
        config = resolved(options, num_prototypes, batch, precision)
        world = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
        torch.manual_seed(0)
        student, teacher = (Network(config.model, config.objective) for _ in range(2))
        student.init_weights()
        teacher.load_state_dict(student.state_dict())
        objective = Objective(config, student, teacher).place(world)
        self.training, self.schedules = TrainStep(config, objective, world), Schedules(config)
        self.batch = batch

    def step(self, number: int, shown: Crops) -> float:
        """One step."""
        global_crops, local_crops, masks = shown
        batch = Batch(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            positions=torch.arange(self.batch),
            keys=[str(i) for i in range(self.batch)],
            bad=[],
            gram_crops=None,
            photometric=None,
        )
        record = self.training([batch], self.schedules.at(number), number)
        return record["dino"] + record["ibot"] + 0.1 * record["koleo"]

    def state(self) -> dict[str, Tensor]:
        """Weights of the student."""
        return self.training.objective.student.state_dict()


class Theirs2:
    """dinov2's step."""

    def __init__(
        self,
        options: argparse.Namespace,
        *,
        num_prototypes: int,
        batch: int,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        from peers_dinov2 import Dinov2, prepare

        prepare(options.dinov2)
        head = {
            "head_n_prototypes": num_prototypes,
            "head_hidden_dim": HIDDEN,
            "head_bottleneck_dim": BOTTLENECK,
        }
        values = {
            "dino": head,
            "ibot": head | {"separate_head": True},
            "train": {"batch_size_per_gpu": batch, "OFFICIAL_EPOCH_LENGTH": 100, "centering": "sinkhorn_knopp"},
            "student": {"patch_size": PATCH_PX, "drop_path_rate": 0.0},
            "teacher": {"momentum_teacher": 0.994, "warmup_teacher_temp_epochs": 3},
            "optim": {"epochs": 10, "warmup_epochs": 1, "freeze_last_layer_epochs": 0},
            "crops": {
                "global_crops_size": options.global_px,
                "local_crops_size": options.local_px,
                "local_crops_number": LOCALS,
            },
        }
        torch.manual_seed(0)
        self.peer = Dinov2(values, (options.dim, options.depth, options.dim // 64))
        if weights is not None:
            self.peer.arch.student.load_state_dict(weights)
            self.peer.start_teacher()

    def step(self, number: int, shown: Crops) -> float:
        """One step."""
        from peers_dinov2 import collated

        losses, _ = self.peer.step(collated(*shown), number)
        dino = losses["dino_global_crops_loss"] + losses["dino_local_crops_loss"]
        return dino + 2 * losses["ibot_loss"] + 2 * losses["koleo_loss"]


class Theirs3:
    """dinov3's step."""

    def __init__(self, options: argparse.Namespace, *, num_prototypes: int, batch: int) -> None:
        from peers_dinov3 import Dinov3, prepare

        prepare(options.dinov3)
        torch.manual_seed(0)
        self.peer = Dinov3(
            dim=options.dim,
            depth=options.depth,
            patch_px=PATCH_PX,
            pixels=(options.global_px, options.local_px),
            num_locals=LOCALS,
            head=(num_prototypes, HIDDEN, BOTTLENECK),
            batch=batch,
        )

    def step(self, number: int, shown: Crops) -> float:
        """One step."""
        return self.peer.step(*shown, number)


# Rows


Numbers = dict[str, list[float]]  # by side


def take_turns(options: argparse.Namespace, sides: dict[str, Side], repeats: int) -> tuple[Numbers, Numbers]:
    """CPU seconds and losses of ``repeats`` steps of each side, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        shown = crops(options, number, options.batch)
        for name, side in sides.items():
            started = time.process_time()
            losses[name].append(side.step(number, shown))
            seconds[name].append(time.process_time() - started)
    return {name: values[1:] for name, values in seconds.items()}, losses


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Ours and the peers, interleaved."""
    ours = Ours(options, num_prototypes=4096, batch=options.batch)
    sides: dict[str, Side] = {"ours": ours}
    sides["dinov2"] = Theirs2(options, num_prototypes=4096, batch=options.batch, weights=ours.state())
    if options.dinov3 is not None:
        sides["dinov3"] = Theirs3(options, num_prototypes=4096, batch=options.batch)
    seconds, losses = take_turns(options, sides, options.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        ratio = value / medians["ours"]
        print(f"speed K=4,096 {name:<7} {value:7.3f} CPU s a step  {ratio:5.2f} x ours  loss {losses[name][0]:.5f}")
    return {"cpu_s": seconds, "median_s": medians, "first_loss": {name: values[0] for name, values in losses.items()}}


def high_water(options: argparse.Namespace, side: str) -> dict[str, float]:
    """Bytes of resident memory at most, in a process of its own: after imports, and after three steps."""
    command = [sys.executable, str(HERE), "--dinov2", str(options.dinov2), "--memory-of", side]
    for key in ("dim", "depth", "global_px", "local_px", "memory_batch"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_memory(options: argparse.Namespace) -> None:
    """What the fresh process does."""
    if options.memory_of == "dinov2":  # its imports count as imports
        from peers_dinov2 import prepare

        prepare(options.dinov2)
        import dinov2.train  # noqa: F401

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    start = peak()
    kind = {"ours": Ours, "dinov2": Theirs2}[options.memory_of]
    side = kind(options, num_prototypes=65536, batch=options.memory_batch)
    built = peak()
    batches = [crops(options, number, options.memory_batch) for number in range(3)]
    started = time.process_time()
    for number, shown in enumerate(batches):
        side.step(number, shown)
    cpu_s = (time.process_time() - started) / 3
    print(json.dumps({"imports": start, "built": built, "peak": peak(), "cpu_s": cpu_s}))


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Ours and dinov2, each in a fresh process."""
    found = {side: high_water(options, side) for side in ("ours", "dinov2")}
    for name, values in found.items():
        print(
            f"memory K=65,536 {name:<7} {values['peak'] / 1e9:6.2f} GB at most, {values['imports'] / 1e9:.2f} of it "
            f"imports; {values['cpu_s']:6.2f} CPU s a step"
        )
    ratio = found["ours"]["peak"] / found["dinov2"]["peak"]
    print(f"memory ratio {ratio:.3f} goal {MEMORY_GOAL} {'ok' if ratio <= MEMORY_GOAL else 'short'}")
    return {**found, "ratio": ratio}


def half(options: argparse.Namespace) -> dict[str, Any]:
    """Ours in bf16 beside ours in fp32, from the same weights on the same batches."""
    sides: dict[str, Side] = {
        name: Ours(options, num_prototypes=4096, batch=options.batch, precision=name) for name in ("fp32", "bf16")
    }
    seconds, losses = take_turns(options, sides, options.half_steps - 1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = zip(losses["fp32"], losses["bf16"], strict=True)
    apart = max(abs(other - loss) / abs(loss) for loss, other in pairs)
    ratio = medians["fp32"] / medians["bf16"]
    goal = "ok" if ratio >= BF16_GOAL and apart <= BF16_LOSS_GOAL else "short"
    print(
        f"bf16 {medians['bf16']:.3f} CPU s a step, fp32 {medians['fp32']:.3f}: {ratio:.2f} x; losses at most "
        f"{apart:.3%} apart over {options.half_steps} steps; goals {BF16_GOAL} and {BF16_LOSS_GOAL:.0%}: {goal}"
    )
    return {"median_s": medians, "ratio": ratio, "largest_loss_difference": apart, "losses": losses}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="checkout of facebookresearch/dinov2")
    parser.add_argument("--dinov3", type=Path, help="checkout of facebookresearch/dinov3; it is run, no more")
    parser.add_argument("--rows", nargs="+", choices=("speed", "memory", "bf16"), default=["speed", "memory", "bf16"])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--global-px", type=int, default=112)
    parser.add_argument("--local-px", type=int, default=56)
    parser.add_argument("--batch", type=int, default=4, help="pictures a step, for speed and bf16")
    parser.add_argument("--memory-batch", type=int, default=32, help="dinov2 trains with 64 a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--half-steps", type=int, default=50)
    parser.add_argument("--json", type=Path, default=Path("trainstep.json"), help="where the numbers go")
    parser.add_argument("--memory-of", choices=("ours", "dinov2"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        measure_memory(options)
        return 0
    print(
        f"dim {options.dim}, {options.depth} blocks, patch {PATCH_PX}; 2 x {options.global_px} + {LOCALS} x "
        f"{options.local_px} px; batch {options.batch}, {options.memory_batch} for memory; one thread. xformers, which "
        "dinov2 asks for, is a stand-in: torch's fused attention for each length of sequence; its FSDP is left out"
    )
    report: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if isinstance(value, int | list)},
        "stand_in": "xformers.ops by tests/benchmarks/peers_dinov2.py; no FSDP; gloo group of one",
        "machine": {"cpus": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }
    rows = {"memory": memory, "speed": speed, "bf16": half}
    for name, row in rows.items():
        if name in options.rows:
            report[name] = row(options)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers: {options.json}")
    if "speed" not in options.rows:
        return 0
    medians = report["speed"]["median_s"]
    ratio = medians["dinov2"] / medians["ours"]
    print(f"trainstep ratio {ratio:.3f} goal {SPEED_GOAL} {'ok' if ratio >= SPEED_GOAL else 'short'}")
    return 0 if ratio >= SPEED_GOAL else 1


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
