"""Samples to a batch: crops stacked view by view, masks, and where the masked patches are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.config import MaskConfig
from training.data.augment import Crops
from training.data.masks import Grid, draw_masks
from training.data.samples import BadSample


class Viewed(NamedTuple):
    """A sample of which the views are drawn."""

    crops: Crops
    position: int  # in the stream
    key: str
    bad: Sequence[BadSample] = ()  # pictures that could not be read and that it replaces


@dataclass(kw_only=True)
class Batch:
    """A micro-batch of B pictures. Crops are view-major: view 1 of all pictures, then view 2, ….

    N is the number of patches of a global crop, M that of masked patches in the batch.
    """

    global_crops: Tensor  # uint8 [2 B, 3, G, G]
    local_crops: Tensor | None  # uint8 [L B, 3, l, l]
    masks: Tensor  # bool [2 B, N]
    positions: Tensor  # int64 [B], in the stream
    keys: list[str]
    bad: list[BadSample]
    gram_crops: Tensor | None = None  # uint8 [2 B, 3, g, g]
    # Parameters of ``photometric.apply``, always in main memory: float32, global_crops [2 B, P], local_crops [L B, P]
    photometric: dict[str, Tensor] | None = None
    masked_indices: Tensor = field(init=False)  # int64 [M], into [2 B N]
    masked_weights: Tensor = field(init=False)  # float32 [M]: 1 / masked patches of the crop

    def __post_init__(self) -> None:
        # Here, in the worker: on a device the size of the result would have to be waited for.
        self.masked_indices = self.masks.flatten().nonzero().flatten()
        counts = self.masks.sum(1)
        self.masked_weights = counts.float().reciprocal().repeat_interleave(counts)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which ``to`` copies without waiting."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; what is in page-locked memory comes while the program goes on."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        batch = copy.copy(self)
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                setattr(batch, item.name, move(value))
        return batch


def collate(
    samples: Sequence[Viewed],
    ratios: np.ndarray,
    grid: Grid,
    *,
    seed: int,
    config: MaskConfig,
) -> Batch:
    """Stack samples, and mask their global crops.

    Args:
        samples: at least one, all with the same views.
        ratios: of their global crops out of ``plan_ratios``, float [2 B], view-major.
        grid: patches of a global crop, (rows, columns).
        seed: of the run.
        config: of the masks.
    """
    crops = [sample.crops for sample in samples]
    positions = [sample.position for sample in samples]
    numbers = [2 * position + view for view in range(2) for position in positions]
    has_locals = len(crops[0].local_crops) > 0
    photometric = None
    if crops[0].photometric is not None:
        pairs = [one.photometric for one in crops if one.photometric is not None]
        names = ("global_crops", "local_crops") if has_locals else ("global_crops",)
        photometric = {name: _view_major([pair[i] for pair in pairs]) for i, name in enumerate(names)}
    gram_crops = [one.gram_crops for one in crops if one.gram_crops is not None]
    return Batch(
        global_crops=_view_major([one.global_crops for one in crops]),
        local_crops=_view_major([one.local_crops for one in crops]) if has_locals else None,
        masks=torch.from_numpy(draw_masks(numbers, ratios, grid, seed=seed, config=config)),
        positions=torch.tensor(positions),
        keys=[sample.key for sample in samples],
        bad=[bad for sample in samples for bad in sample.bad],
        gram_crops=_view_major(gram_crops) if gram_crops else None,
        photometric=photometric,
    )


def _view_major(parts: Sequence[Tensor]) -> Tensor:
    """B tensors [V, ...] to one [V B, ...]."""
    return torch.stack(tuple(parts), 1).flatten(0, 1)
