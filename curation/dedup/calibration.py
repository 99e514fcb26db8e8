"""A descriptor in bf16 or fp16 is held against itself in fp32 before any work.

SSCD in half precision can collapse: activations overflow or underflow, and all pictures become copies of each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

from curation.dedup.copydescriptor import Descriptor, DescriptorConfig, open_descriptor
from training.config import ConfigError

NUM_PICTURES = 16
LEAST_SIMILARITY = 0.99  # of each picture's vector to its own in fp32; the step between thresholds is .01
MOST_RISE = 0.02  # of the mean similarity of different pictures; all that are shown are told apart less
_SIDE_PX = 288  # as described pictures are


def open_calibrated(config: DescriptorConfig, fit: dict[str, np.ndarray], pictures: Iterable[np.ndarray]) -> Descriptor:
    """Load a descriptor; one of low precision only if it sees some pictures as it does in fp32.

    Args:
        config: of the descriptor.
        fit: the arrays that ``fit_descriptor`` stores, empty for models with weights.
        pictures: different photographs, RGB uint8 [H, W, 3]; the first 16 are shown.

    Raises:
        ConfigError: vectors are not finite, deviate or collapse; one line.
    """
    opened = open_descriptor(config, fit)
    if config.precision != "fp32":
        import cv2

        size = (_SIDE_PX, _SIDE_PX)
        shown = [cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC) for rgb in islice(pictures, NUM_PICTURES)]
        exact = open_descriptor(config.model_copy(update={"precision": "fp32"}), fit)
        what = deviation(np.stack([exact.vector(rgb) for rgb in shown]), _vectors(opened, shown))
        if what is not None:
            others = "fp32" if config.precision == "bf16" else "fp32, or bf16 if it passes"
            raise ConfigError(
                f"descriptor.precision: got {config.precision!r}, in which {config.kind} on {config.device} {what}; "
                f"allowed with these weights: {others}"
            )
    return opened


def _vectors(descriptor: Descriptor, pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Unit vectors, float32 [N, D]; a row without finite numbers is NaN."""
    rows = []
    for rgb in pictures:
        try:
            rows.append(descriptor.vector(rgb))
        except ValueError:
            rows.append(np.full(descriptor.dim, np.nan, np.float32))
    return np.stack(rows)


def deviation(exact: np.ndarray, low: np.ndarray) -> str | None:
    """What is wrong with vectors of low precision, None where nothing is.

    Args:
        exact: unit vectors of different pictures in fp32, float32 [N, D].
        low: of the same pictures, float32 [N, D].
    """
    num_broken = int((~np.isfinite(low).all(1)).sum())
    if num_broken:
        return f"gives no finite numbers for {num_broken} of {len(low)} photographs"
    pairs = np.triu_indices(len(exact), 1)
    before, after = (float((rows @ rows.T)[pairs].mean()) for rows in (exact, low))
    if after > before + MOST_RISE:
        return (
            f"tells photographs apart less: their mean similarity is {after:.3f}, in fp32 {before:.3f}, and a rise by "
            f"{MOST_RISE} is the most"
        )
    least = float((exact * low).sum(1).min())
    if least < LEAST_SIMILARITY:
        return f"gives a vector with similarity {least:.3f} to its own in fp32, and {LEAST_SIMILARITY} is the least"
    return None
