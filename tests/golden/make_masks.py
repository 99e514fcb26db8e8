"""Golden masks, from facebookresearch/dinov2.

    python tests/golden/make_masks.py --dinov2 PATH

Writes ``masks.npz`` beside this file: masks of dinov2's MaskingGenerator for a few grids, seeds of Python's ``random``
and numbers of patches; and for one batch what its ``collate_data_and_cast`` says of the masked patches.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

GRIDS = ((16, 16), (14, 14), (37, 37), (8, 12))
SEEDS = 12
RATIOS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5)


def load(path: Path) -> ModuleType:
    """One file of dinov2, without the package around it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="checkout of facebookresearch/dinov2")
    folder = parser.parse_args().dinov2 / "dinov2" / "data"
    masking, collating = load(folder / "masking.py"), load(folder / "collate.py")

    stored: dict[str, Any] = {}
    for height, width in GRIDS:
        # its training script has squares only, and says 0.5 * image // patch * image // patch
        largest = 0.5 * height * 14 // 14 * width * 14 // 14
        generator = masking.MaskingGenerator(input_size=(height, width), max_num_patches=largest)
        masks, targets = [], []
        for seed in range(SEEDS):
            target = int(height * width * RATIOS[seed % len(RATIOS)])
            random.seed(seed)
            masks.append(generator(target).ravel())
            targets.append(target)
        stored[f"masks_{height}x{width}"] = np.packbits(np.array(masks), axis=1)
        stored[f"targets_{height}x{width}"] = np.array(targets)

    generator = masking.MaskingGenerator(input_size=(14, 14), max_num_patches=0.5 * 196 // 14 * 196 // 14)
    crops = [{"global_crops": [torch.zeros(1)] * 2, "local_crops": [torch.zeros(1)]} for _ in range(8)]
    random.seed(3)
    batch = collating.collate_data_and_cast(
        [(one, None) for one in crops], (0.1, 0.5), 0.5, torch.float32, n_tokens=196, mask_generator=generator
    )
    stored["batch_masks"] = batch["collated_masks"].numpy()
    stored["batch_indices"] = batch["mask_indices_list"].numpy()
    stored["batch_weights"] = batch["masks_weight"].numpy()
    np.savez_compressed(Path(__file__).with_name("masks.npz"), **stored)


if __name__ == "__main__":
    main()
