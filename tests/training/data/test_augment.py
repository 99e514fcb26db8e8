from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image
from torchvision import transforms

from training.config import ViewConfig
from training.data.augment import Box, Crops, Views, draw_box, resized
from training.data.photometric import ORDER, SIGMA, SOLARIZE, apply

SMALL = {"global_px": 56, "local_px": 28, "num_locals": 4}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return load_sample_image("flower.jpg")  # uint8 [427, 640, 3]


def equal(one: Crops, other: Crops) -> bool:
    return torch.equal(one.global_crops, other.global_crops) and torch.equal(one.local_crops, other.local_crops)


# Boxes


@pytest.mark.parametrize("size", [(300, 400), (224, 224), (90, 640), (37, 41)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_distributed_as_torchvisions(size, scale):
    height, width = size
    num = 1500
    rng = np.random.default_rng(11)
    ours = np.array([draw_box((height, width, 3), scale, (3 / 4, 4 / 3), rng) for _ in range(num)])
    torch.manual_seed(2)
    picture = torch.empty(3, height, width)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(num)])
    for quantity in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 0] + box[:, 2],
        lambda box: box[:, 1] + box[:, 3],
    ):
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.001
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize("size", [(20, 400), (400, 20), (1, 1), (1, 900), (3, 2)])
def test_a_picture_that_no_box_fits_into_is_cut_in_its_middle_as_by_torchvision(size):
    torch.manual_seed(0)
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, *size), [1.0, 1.0], [3 / 4, 4 / 3])
    ours = draw_box((*size, 3), (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    if size in ((20, 400), (400, 20), (1, 900)):
        assert tuple(ours) == tuple(theirs)
    assert ours.height >= 1
    assert ours.width >= 1


def test_what_is_drawn_does_not_depend_on_the_picture(photo):
    views = Views(ViewConfig(**SMALL))
    states = []
    for picture in (photo, photo[:30, :600], photo[:1, :1]):
        rng = np.random.default_rng(4)
        views.draw(picture, rng)
        states.append(rng.random())
    assert len(set(states)) == 1


# Pixels


@pytest.mark.parametrize(
    ("box", "side_px"),
    [
        (Box(0, 0, 427, 640), 224),
        (Box(30, 100, 300, 280), 224),
        (Box(77, 31, 150, 170), 224),
        (Box(200, 300, 120, 95), 98),
        (Box(5, 9, 61, 55), 98),
        (Box(50, 60, 98, 98), 98),
        (Box(3, 4, 1, 2), 28),
    ],
)
def test_a_crop_is_pillows_antialiased_bicubic(photo, box, side_px):
    top, left, height, width = box
    cut = Image.fromarray(photo).crop((left, top, left + width, top + height))
    size = (side_px, side_px)
    found = resized(photo, box, side_px).astype(int)
    rows_first = cut.resize((side_px, height), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
    assert np.abs(found - rows_first).max() <= 1
    # Pillow chooses which direction comes first; then overshoots are clipped, and values rounded, elsewhere
    off = np.abs(found - cut.resize(size, Image.Resampling.BICUBIC))
    assert off.max() <= 20
    assert (off > 1).mean() < 0.005
    assert off.mean() < 0.4


def test_without_photometric_changes_a_view_is_a_flipped_or_unflipped_box(photo):
    config = ViewConfig(**SMALL, jitter_probability=0, grey=0, blur="released")  # which never blurs global 1
    rng = np.random.default_rng(0)
    found = {True: 0, False: 0}
    for _ in range(40):
        crops = Views(config, gram_px=56).draw(photo, rng)
        assert crops.gram_crops is not None
        torch.testing.assert_close(crops.global_crops[0], crops.gram_crops[0], rtol=0, atol=0)
        # the flower stands right of the middle: the brighter half tells the flip of a big crop
        bright = crops.gram_crops[0].float().mean((0, 1))
        found[bool(bright[:28].mean() > bright[28:].mean())] += 1
    assert min(found.values()) >= 5


def test_gram_crops_show_the_same_place_at_another_size_without_changes(photo):
    config = ViewConfig(**SMALL)
    crops = Views(config, gram_px=112).draw(photo, np.random.default_rng(3))
    plain = Views(ViewConfig(**SMALL | {"on_device": True})).draw(photo, np.random.default_rng(3))
    assert crops.gram_crops is not None
    assert crops.gram_crops.shape == (2, 3, 112, 112)
    halved = torch.nn.functional.interpolate(crops.gram_crops, (56, 56), mode="bicubic", antialias=True)
    assert (halved.float() - plain.global_crops.float()).abs().mean() < 4
    assert equal(crops, Views(config).draw(photo, np.random.default_rng(3)))


def test_parameters_for_the_device_give_the_views_of_the_worker(photo):
    worker = Views(ViewConfig(**SMALL)).draw(photo, np.random.default_rng(8))
    device = Views(ViewConfig(**SMALL, on_device=True)).draw(photo, np.random.default_rng(8))
    assert worker.photometric is None
    assert device.photometric is not None
    for crops, parameters, expected in zip(device[:2], device.photometric, worker[:2], strict=True):
        off = (apply(crops, parameters).int() - expected.int()).abs().float()
        assert off.mean() < 1.5  # hue: see the head of photometric


def test_views_are_as_declared(photo):
    crops = Views(ViewConfig(**SMALL)).draw(photo, np.random.default_rng(0))
    assert crops.global_crops.shape == (2, 3, 56, 56)
    assert crops.local_crops.shape == (4, 3, 28, 28)
    assert crops.global_crops.dtype == crops.local_crops.dtype == torch.uint8
    assert crops.gram_crops is None
    none = Views(ViewConfig(**SMALL | {"num_locals": 0})).draw(photo, np.random.default_rng(0))
    assert none.local_crops.shape == (0, 3, 28, 28)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (9, 8)])
def test_the_smallest_pictures_have_views_too(size):
    picture = np.full((*size, 3), 77, np.uint8)
    config = ViewConfig(**SMALL | {"jitter_probability": 0, "solarize": 0})
    crops = Views(config, gram_px=64).draw(picture, np.random.default_rng(0))
    assert (crops.global_crops == 77).all()
    assert (crops.local_crops == 77).all()


def test_the_picture_may_be_read_only_and_stays_as_it_is(photo):
    picture = photo.copy()
    picture.flags.writeable = False
    Views(ViewConfig(**SMALL)).draw(picture, np.random.default_rng(0))
    np.testing.assert_array_equal(picture, photo)


# Repeatable


def test_views_follow_from_the_generator_whatever_the_threads(photo):
    views = Views(ViewConfig(**SMALL))
    first = views.draw(photo, np.random.default_rng(9))
    torch.set_num_threads(2)
    cv2.setNumThreads(2)
    again = views.draw(photo, np.random.default_rng(9))
    torch.set_num_threads(1)
    assert equal(first, again)
    assert not equal(first, views.draw(photo, np.random.default_rng(10)))


# As dinov2


@pytest.mark.parametrize(("blur", "expected"), [("released", (0.0, 0.9, 0.5)), ("paper", (1.0, 0.1, 0.5))])
def test_effective_probabilities_are_those_of_dinov2(blur, expected):
    num = 500
    picture = np.zeros((8, 8, 3), np.uint8)
    views = Views(ViewConfig(global_px=8, local_px=8, num_locals=2, blur=blur, on_device=True))
    rng = np.random.default_rng(6)
    drawn = [views.draw(picture, rng).photometric for _ in range(num)]
    first = torch.stack([pair[0][0] for pair in drawn])
    second = torch.stack([pair[0][1] for pair in drawn])
    local = torch.cat([pair[1] for pair in drawn])
    for rows, probability, solarize in zip((first, second, local), expected, (0, 0.2, 0), strict=True):
        assert stats.binomtest(int((rows[:, SIGMA] > 0).sum()), len(rows), probability).pvalue > 0.001
        assert stats.binomtest(int((rows[:, SOLARIZE] > 0).sum()), len(rows), solarize).pvalue > 0.001
        assert stats.binomtest(int((rows[:, ORDER] >= 0).sum()), len(rows), 0.8).pvalue > 0.001


def test_views_are_distributed_as_those_of_dinov2s_operations_on_pillow_pictures(photo):
    num, side = 150, 56
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    blur = transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 2.0))], p=0.9)
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(side, (0.32, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            jitter,
            transforms.RandomGrayscale(0.2),
            blur,
            transforms.RandomSolarize(128, p=0.2),
        ]
    )
    torch.manual_seed(1)
    picture = Image.fromarray(photo)
    theirs = np.stack([np.asarray(reference(picture)) for _ in range(num)]).transpose(0, 3, 1, 2)
    rng = np.random.default_rng(1)
    views = Views(ViewConfig(global_px=side, num_locals=0))
    ours = np.stack([views.draw(photo, rng).global_crops[1].numpy() for _ in range(num)])
    for quantity in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)),
        lambda x: np.abs(np.diff(x, axis=3)).mean((1, 2, 3)),
        lambda x: x[..., : side // 2].mean((1, 2, 3)) - x[..., side // 2 :].mean((1, 2, 3)),
    ):
        assert stats.ks_2samp(quantity(ours.astype(float)), quantity(theirs.astype(float))).pvalue > 0.001
