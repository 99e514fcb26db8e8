"""What the stages after the first are worth, on networks that the learning benchmark made.

    make bench NAME=stages ARGS="--data tiny_imagenet_100c.parquet --folder FOLDER"

with the FOLDER of ``learning``. Higher resolution: the first seed's network goes on at twice the side; kNN before and
after, and the cosine of each patch at the low side with those at the high side, pooled to the same grid. Distillation:
for each seed a smaller student learns from its network, and the same student from scratch for as many steps. Readout as
in ``learning``. Runs already finished in FOLDER are taken as they are. Writes a JSON and ends with one line.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from learning import machine, run_all
from torch import Tensor

from pipelines.train import load_training_recipe
from training.config import ViewConfig
from training.eval.evaluate import Evaluator
from training.export import read_network
from training.models.vit import VisionTransformer

GOAL_LOSS, GOAL_COSINE = 0.01, 0.8
LOW_PX, HIGH_PX = 48, 96
SHOWN_AT_HIGH = [f"evaluation.image_px={HIGH_PX}", f"evaluation.resize_px={HIGH_PX}"]
HIGHRES = [
    f"views.global_px={HIGH_PX}",
    f"views.local_px={HIGH_PX // 2}",
    f"model.image_px={HIGH_PX}",
    *SHOWN_AT_HIGH,
    "optim.lr=0.0001",
    "schedule.length=100",
    "schedule.warmup=10",
    "evaluation.every=100",
]
SMALL = ["model.dim=64", "model.depth=4", "model.num_heads=2"]
# A fixed teacher's targets do not move, and bear a higher rate than a student that chases itself.
DISTILLED = ["optim.lr=0.001"]
SMALL += ["schedule.length=300", "schedule.warmup=15", "evaluation.every=300"]


def evaluator(data: str, overrides: list[str]) -> Evaluator:
    """Measures as the recipe does."""
    sets = "evaluation.sets.val"
    places = [f"data.parts.train.location={data}", f"{sets}.train.location={data}", f"{sets}.test.location={data}"]
    resolved = load_training_recipe("tiny_imagenet", [*places, *overrides]).resolved("pretrain")
    return Evaluator(resolved.evaluation, resolved.views)


@torch.inference_mode()
def pooled_cosine(
    low_net: VisionTransformer, high_net: VisionTransformer, pictures: Tensor, views: ViewConfig
) -> float:
    """Median over patches of pictures, uint8 [n, 3, H, W], shown to one network at the low side, to the other at the
    high one, whose patches are pooled to the grid of the low side."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (views.mean, views.std))
    grid, ratio = HIGH_PX // high_net.config.patch_px, HIGH_PX // LOW_PX

    def patches(net: VisionTransformer, batch: Tensor, side_px: int) -> Tensor:  # [n, N, D]
        sized = F.interpolate(batch.float(), (side_px, side_px), mode="bicubic", antialias=True).clamp(0, 255)
        return net([(sized / 255 - mean) / std])[0].patches

    cosines = []
    for batch in pictures.split(100):
        low = patches(low_net, batch, LOW_PX)
        maps = patches(high_net, batch, HIGH_PX).transpose(1, 2).unflatten(2, (grid, grid))  # [n, D, g, g]
        cosines.append(F.cosine_similarity(low, F.avg_pool2d(maps, ratio).flatten(2).transpose(1, 2), dim=-1).flatten())
    return float(torch.cat(cosines).median())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the learning benchmark")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the numbers go; default: FOLDER/stages.json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    data = os.path.abspath(options.data)
    teachers = [options.folder.absolute() / f"seed{seed}" / "network.safetensors" for seed in range(options.seeds)]
    runs = {"highres": [f"stages={{highres: {{kind: highres, init: {{source: {teachers[0]}}}}}}}", *HIGHRES]}
    for seed, teacher in enumerate(teachers):
        distill = f"stages={{distill: {{kind: distill, distill: {{teacher: {teacher}, output_momentum: 0.98}}}}}}"
        runs |= {
            f"seed{seed}-distilled": [distill, *SMALL, *DISTILLED, f"seed={seed}"],
            f"seed{seed}-scratch": [*SMALL, f"seed={seed}"],
        }
    found = run_all(runs, options.folder, data, options.overrides)

    torch.set_num_threads(1)
    before, after = (
        read_network(path, with_heads=False)
        for path in (teachers[0], options.folder / "highres" / "network.safetensors")
    )
    nets = {"before": before.network.backbone.eval(), "after": after.network.backbone.eval()}
    at_low, at_high = evaluator(data, options.overrides), evaluator(data, [*options.overrides, *SHOWN_AT_HIGH])
    knn = {
        "before": at_low(nets["before"])["knn_val"],
        "before, shown at the high side": at_high(nets["before"])["knn_val"],
    }
    knn |= {"after": found["highres"]["knn_val"], "after, shown at the low side": at_low(nets["after"])["knn_val"]}
    pictures = torch.stack([torch.from_numpy(rgb).permute(2, 0, 1) for rgb in at_low.sets["val"].test.prepared()])
    cosines = {
        "after, both sides": pooled_cosine(nets["after"], nets["after"], pictures, after.views),
        "before at the low side, after at the high": pooled_cosine(
            nets["before"], nets["after"], pictures, after.views
        ),
    }
    for name, value in knn.items():
        print(f"kNN {name:<32} {100 * value:.2f}")
    for name, value in cosines.items():
        print(f"median cosine, {name:<44} {value:.3f}")
    gains = [
        found[f"seed{s}-distilled"]["knn_val"] - found[f"seed{s}-scratch"]["knn_val"] for s in range(options.seeds)
    ]
    facts = machine() | {"knn": knn, "cosines": cosines, "runs": found, "distill_gains": gains}
    (options.json or options.folder / "stages.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"higher resolution: {100 * (knn['after'] - knn['before']):+.2f} points, goal from -{100 * GOAL_LOSS:.0f} on")
    print(f"distilled above scratch in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds: "
          + ", ".join(f"{100 * gain:+.2f}" for gain in gains))  # fmt: skip
    is_ok = knn["before"] - knn["after"] <= GOAL_LOSS and min(cosines.values()) >= GOAL_COSINE and min(gains) > 0
    print(f"stages ratio {min(cosines.values()) / GOAL_COSINE:.2f} goal 1.0 {'ok' if is_ok else 'short'}")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
