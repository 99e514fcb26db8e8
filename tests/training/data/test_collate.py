from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from training.config import MaskConfig, ViewConfig
from training.data.augment import Crops, Views
from training.data.collate import Batch, Viewed, collate
from training.data.masks import plan_ratios
from training.data.samples import BadSample

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "masks.npz")
GRID = (4, 4)


def viewed(position: int, *, num_locals: int = 3, gram_px: int | None = None, **options) -> Viewed:
    config = ViewConfig(global_px=32, local_px=16, num_locals=num_locals, **options)
    picture = load_sample_image("china.jpg")[:200, :200]
    crops = Views(config, gram_px=gram_px).draw(picture, np.random.default_rng(position))
    return Viewed(crops, position, f"part/{position}")


def batch_of(samples: list[Viewed], ratios: np.ndarray | None = None) -> Batch:
    ratios = np.full(2 * len(samples), 0.3) if ratios is None else ratios
    return collate(samples, ratios, GRID, seed=0, config=MaskConfig())


def test_masked_indices_and_weights_are_dinov2s():
    masks = torch.from_numpy(GOLDEN["batch_masks"])
    batch = Batch(
        global_crops=torch.zeros(len(masks), 3, 8, 8, dtype=torch.uint8),
        local_crops=None,
        masks=masks,
        positions=torch.arange(len(masks) // 2),
        keys=[""] * (len(masks) // 2),
        bad=[],
    )
    assert batch.masked_indices.dtype == torch.int64
    np.testing.assert_array_equal(batch.masked_indices.numpy(), GOLDEN["batch_indices"])
    np.testing.assert_array_equal(batch.masked_weights.numpy(), GOLDEN["batch_weights"])


def test_weights_of_a_masked_crop_sum_to_one():
    batch = batch_of([viewed(i) for i in range(4)], np.array([0.3, 0, 0.1, 0, 0, 0.5, 0, 0]))
    crop = batch.masked_indices // batch.masks.shape[1]
    sums = torch.zeros(8).index_add_(0, crop, batch.masked_weights)
    torch.testing.assert_close(sums, batch.masks.any(1).float())


def test_without_masks_there_are_no_indices():
    batch = batch_of([viewed(0)], np.zeros(2))
    assert batch.masked_indices.shape == batch.masked_weights.shape == (0,)


def test_crops_are_stacked_view_by_view():
    def marked(picture: int) -> Viewed:
        views = torch.arange(2, dtype=torch.uint8) * 100 + picture
        local = torch.arange(3, dtype=torch.uint8) * 50 + picture
        whole = torch.ones(1, 3, 8, 8, dtype=torch.uint8)
        crops = Crops(views.view(2, 1, 1, 1) * whole, local.view(3, 1, 1, 1) * whole, None, None)
        return Viewed(crops, picture, str(picture))

    batch = batch_of([marked(0), marked(1), marked(2)])
    assert batch.global_crops[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert batch.local_crops is not None
    assert batch.local_crops[:, 0, 0, 0].tolist() == [0, 1, 2, 50, 51, 52, 100, 101, 102]
    assert batch.positions.tolist() == [0, 1, 2]
    assert batch.keys == ["0", "1", "2"]


def test_shapes_with_gram_crops_and_parameters_for_the_device():
    batch = batch_of([viewed(i, gram_px=48, on_device=True) for i in range(2)])
    assert batch.gram_crops is not None
    assert batch.gram_crops.shape == (4, 3, 48, 48)
    assert batch.photometric is not None
    assert batch.photometric["global_crops"].shape == (4, 8)
    assert batch.photometric["local_crops"].shape == (6, 8)
    assert batch.masks.shape == (4, 16)


def test_no_locals_are_none():
    batch = batch_of([viewed(0, num_locals=0)])
    assert batch.local_crops is None
    assert batch.photometric is None
    assert batch.gram_crops is None


def test_micro_batches_hold_what_the_whole_batch_holds():
    samples = [viewed(position) for position in range(40, 46)]
    ratios = plan_ratios(12, seed=0, step=0, config=MaskConfig())
    whole = batch_of(samples, ratios)
    by_view = ratios.reshape(2, 6)
    for start, end in ((0, 2), (2, 6)):
        part = batch_of(samples[start:end], by_view[:, start:end].ravel())
        rows = [*range(start, end), *range(6 + start, 6 + end)]
        torch.testing.assert_close(part.masks, whole.masks[rows])
        torch.testing.assert_close(part.global_crops, whole.global_crops[rows])


def test_bad_pictures_come_along():
    bad = BadSample(part="a", shard="s", key="k", reason="missing")
    batch = batch_of([viewed(0), viewed(1)._replace(bad=[bad])])
    assert batch.bad == [bad]


def test_a_batch_moves_and_travels_between_processes():
    batch = batch_of([viewed(0, on_device=True)])
    moved = batch.to("meta")
    for name in ("global_crops", "local_crops", "masks", "positions", "masked_indices", "masked_weights"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert moved.photometric is not None
    assert moved.photometric["global_crops"].device.type == "cpu"
    assert moved.keys == batch.keys
    again = pickle.loads(pickle.dumps(batch))
    torch.testing.assert_close(again.global_crops, batch.global_crops)
    torch.testing.assert_close(again.masked_indices, batch.masked_indices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: page-locked memory is CUDA's")
def test_a_batch_can_be_page_locked():
    batch = batch_of([viewed(0)]).pin_memory()
    assert batch.global_crops.is_pinned()
    assert batch.masked_indices.is_pinned()
    assert batch.to("cuda").masks.is_cuda
