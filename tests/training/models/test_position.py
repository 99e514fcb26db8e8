"""Position embeddings on other grids."""

import pytest
import torch

from tests.training.models.golden import MADE, golden, names
from training.models.position import resize_positions

POSITION_DIM = MADE["POSITION_DIM"]


@pytest.mark.parametrize("case", names("position/"))
def test_resized_grid_is_that_of_dinov2(case: str):
    flavour, stored, wanted = case.split("/")
    side = int(stored.split("x")[0])
    height, width = map(int, wanted.split("x"))
    positions = MADE["noise"](f"position {side}", 1, 1 + side * side, POSITION_DIM)
    resized = resize_positions(positions, (height, width), flavour)
    torch.testing.assert_close(resized, golden(f"position/{case}"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("flavour", ["offset", "size"])
def test_stored_grid_comes_back_as_it_is(flavour: str):
    positions = torch.randn(1, 50, 4)
    assert resize_positions(positions, (7, 7), flavour) is positions


def test_as_many_patches_on_a_grid_of_another_shape_are_resized_too():
    positions = torch.randn(1, 17, 4)
    resized = resize_positions(positions, (2, 8), "offset")
    assert resized.shape == positions.shape
    assert not torch.equal(resized, positions)
    assert torch.equal(resized[:, 0], positions[:, 0])


def test_half_precision_positions_are_resized_in_full_precision():
    positions = torch.randn(1, 50, 4).bfloat16()
    resized = resize_positions(positions, (4, 5), "size")
    assert torch.equal(resized, resize_positions(positions.float(), (4, 5), "size").bfloat16())


@pytest.mark.parametrize("num", [1, 8])
def test_grid_that_is_not_square_is_refused(num: int):
    with pytest.raises(ValueError, match=f"got {num - 1} positions of patches; allowed: a square number"):
        resize_positions(torch.zeros(1, num, 4), (2, 2), "size")
