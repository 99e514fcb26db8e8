"""What the training is given: the same for any number of ranks, micro-batches and workers, from any step on."""

import io
import multiprocessing
import os
import signal
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from training.config import ConfigError, Resolved, TrainRecipe, ViewConfig, lay_over
from training.data.collate import Batch
from training.data.index import Index
from training.data.loader import Loader, _in_order, _Worker, micro_batches
from training.data.pixels import MAX_PIXELS
from training.data.samples import DataError, Reader, decode_shortest_px
from training.data.tars import TarWriter


def jpeg(number: int, height: int = 40, width: int = 56) -> bytes:
    """Noise that tells its number."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tars(folder: Path, num_tars: int = 4, per_tar: int = 6, bad: dict[int, bytes] | None = None) -> Path:
    """Pictures 0, 1, … by key; those in ``bad`` with other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for tar in range(num_tars):
        writer = TarWriter(folder / f"{tar}.tar")
        for number in range(tar * per_tar, (tar + 1) * per_tar):
            writer.add(f"{number:03d}.jpg", (bad or {}).get(number, jpeg(number)))
        writer.close()
    return folder


def resolved(folder: Path, **changes: object) -> Resolved:
    values = {
        "name": "small",
        "run": "unused",
        "model": {"patch_px": 8, "image_px": 16},
        "views": {"global_px": 16, "local_px": 8, "num_locals": 2},
        "data": {
            "parts": {"made": {"kind": "tars", "location": str(folder)}},
            "batch_size": 8,
            "shuffle_shards": 2,
            "num_workers": 0,
        },
        "schedule": {"length": 9, "warmup": 0},
    }
    return TrainRecipe.model_validate(lay_over(values, changes)).resolved("pretrain")


def batches(of: Resolved, *, rank: int = 0, world: int = 1, start_step: int = 0) -> list[Batch]:
    with Loader(of, Index.open(of.data), rank=rank, world=world, start_step=start_step) as loader:
        return list(loader)


def content(found: list[Batch]) -> dict[int, tuple[object, ...]]:
    """By position: key, and what the views and masks of the picture are."""
    samples = {}
    for batch in found:
        size = len(batch.keys)
        assert batch.global_crops.shape == (2 * size, 3, 16, 16)
        assert batch.local_crops.shape == (2 * size, 3, 8, 8)
        assert batch.masks.shape == (2 * size, 4)
        for place, position in enumerate(batch.positions.tolist()):
            views = (batch.global_crops, batch.local_crops, batch.masks)
            shown = [view.unflatten(0, (2, size))[:, place].numpy().tobytes() for view in views]
            assert position not in samples
            samples[position] = (batch.keys[place], *shown)
    return samples


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="module")
def whole(tars: Path) -> list[Batch]:
    """By one process without workers."""
    return batches(resolved(tars))


def test_every_picture_comes_once_a_pass_with_new_views(whole: list[Batch]):
    assert [batch.positions.tolist() for batch in whole] == [list(range(b * 8, b * 8 + 8)) for b in range(9)]
    keys = [key for batch in whole for key in batch.keys]
    for epoch in range(3):
        assert sorted(keys[epoch * 24 : epoch * 24 + 24]) == [f"made/{n // 6}.tar/{n:03d}" for n in range(24)]
    assert len({views for _, views, *_ in content(whole).values()}) == 72


@pytest.mark.parametrize(("world", "micro_batch_size"), [(1, 4), (1, 1), (2, None), (4, None), (2, 2)])
def test_ranks_and_micro_batches_cut_the_same_stream(
    tars: Path, whole: list[Batch], world: int, micro_batch_size: int | None
):
    of = resolved(tars, data={"micro_batch_size": micro_batch_size})
    size, num_micros = micro_batches(of, world)
    ranks = [batches(of, rank=rank, world=world) for rank in range(world)]
    assert {len(found) for found in ranks} == {9 * num_micros}
    for step in range(9):
        mine = [b for found in ranks for b in found[step * num_micros : (step + 1) * num_micros]]
        assert [len(batch.keys) for batch in mine] == [size] * (world * num_micros)
        assert [key for batch in mine for key in batch.keys] == whole[step].keys
    assert content([batch for found in ranks for batch in found]) == content(whole)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_what_the_process_itself_gives_in_the_same_order(tars: Path, whole: list[Batch], num_workers: int):
    state = torch.get_rng_state()
    found = batches(resolved(tars, data={"num_workers": num_workers, "prefetch": 3}))
    assert [batch.keys for batch in found] == [batch.keys for batch in whole]
    assert content(found) == content(whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resume_goes_on_where_it_was_with_another_number_of_ranks(tars: Path, whole: list[Batch]):
    of = resolved(tars)
    rest = [batch for rank in range(2) for batch in batches(of, rank=rank, world=2, start_step=5)]
    assert content(rest) == content(whole[5:])
    assert batches(of, start_step=9) == []


def test_seed_and_only_the_seed_changes_the_order(tars: Path, whole: list[Batch], tmp_path: Path):
    moved = write_tars(tmp_path / "elsewhere")
    assert content(batches(resolved(moved))) == content(whole)
    other = content(batches(resolved(tars, seed=1)))
    assert [sample[0] for sample in other.values()] != [sample[0] for sample in content(whole).values()]


def test_gram_crops_and_device_parameters_reach_the_batch(tars: Path):
    of = resolved(tars, objective={"gram": {"weight": 1, "global_px": 24}}, views={"on_device": True})
    batch = batches(of)[0]
    assert batch.gram_crops is not None
    assert batch.gram_crops.shape == (16, 3, 24, 24)
    assert batch.photometric is not None
    assert len(batch.photometric["local_crops"]) == 16


def test_the_cache_gives_the_same_and_reads_each_picture_once(tmp_path: Path, whole: list[Batch]):
    of = resolved(write_tars(tmp_path), data={"cache": True})
    found = []
    with Loader(of, Index.open(of.data), rank=0, world=1, start_step=0) as loader:
        for batch in loader:
            found.append(batch)
            if len(found) == 3:  # a pass
                for path in tmp_path.iterdir():
                    path.unlink()
    assert content(found) == content(whole)


def test_waiting_is_measured(tars: Path):
    of = resolved(tars)
    with Loader(of, Index.open(of.data), rank=0, world=1, start_step=0) as loader:
        start = time.monotonic()
        next(loader)
        next(loader)
        spent = time.monotonic() - start
        assert spent / 2 < loader.take_wait_s() < spent
        assert loader.take_wait_s() == 0


# Bad pictures

TRUNCATED, GARBAGE = jpeg(1)[:300], b"no picture at all"


@pytest.mark.parametrize("world", [1, 2])
def test_bad_pictures_are_named_and_replaced_always_by_the_same_ones(tmp_path: Path, world: int):
    of = resolved(write_tars(tmp_path / "bad", bad={3: TRUNCATED, 7: GARBAGE, 8: b""}))
    index = Index.open(of.data)
    ranks, bad = [], []
    for rank in range(world):
        with Loader(of, index, rank=rank, world=world, start_step=0) as loader:
            ranks += list(loader)
            bad += loader.take_bad()
            assert loader.take_bad() == []
    found = content(ranks)
    assert len(found) == 72
    named = Counter((sample.key, sample.reason) for sample in bad)
    assert named.keys() == {
        ("0.tar/003", "decode_truncated"),
        ("1.tar/007", "decode_unsupported"),
        ("1.tar/008", "decode_unsupported"),
    }
    assert min(named.values()) >= 3  # once a pass, and where they were drawn as replacements
    assert "made: 0.tar/003 in 0.tar: decode_truncated" in {str(sample) for sample in bad}
    good = content(batches(resolved(write_tars(tmp_path / "good"), seed=0)))
    replaced = {position for position, sample in found.items() if sample != good[position]}
    assert {good[position][0][-3:] for position in replaced} == {"003", "007", "008"}
    assert len(replaced) == 9
    assert found == content(batches(of))


def test_a_tar_that_vanishes_is_many_missing_pictures(tmp_path: Path):
    of = resolved(write_tars(tmp_path))
    index = Index.open(of.data)
    (tmp_path / "2.tar").unlink()
    with Loader(of, index, rank=0, world=1, start_step=0) as loader:
        keys = [key for batch in loader for key in batch.keys]
        assert {sample.reason for sample in loader.take_bad()} == {"missing"}
    assert {key.split("/")[1] for key in keys} == {"0.tar", "1.tar", "3.tar"}


def test_a_failing_disk_is_no_bad_picture_and_ends_the_run(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    of = resolved(tmp_path, data={"parts": {"made": {"kind": "folder", "location": str(tmp_path)}}})
    index = Index.open(of.data)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "a.jpg").mkdir()  # reading it fails, and not because it is missing
    with pytest.raises(DataError, match=r"a\.jpg cannot be read: \[Errno 21\]"):
        next(Loader(of, index, rank=0, world=1, start_step=0))


def test_a_tar_that_changes_under_the_run_ends_it(tmp_path: Path):
    of = resolved(write_tars(tmp_path))
    index = Index.open(of.data)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:3000])
    loader = Loader(of, index, rank=0, world=1, start_step=0)
    with pytest.raises(ConfigError, match=r"/\d\.tar: damaged or cut off.*; the file ends at byte 3,000"):
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_pictures_in_a_row_end_the_run_in_one_line(tmp_path: Path, num_workers: int):
    folder = write_tars(tmp_path, num_tars=1, bad=dict.fromkeys(range(6), GARBAGE))
    of = resolved(folder, data={"max_bad_in_row": 5, "num_workers": num_workers})
    with Loader(of, Index.open(of.data), rank=0, world=1, start_step=0) as loader, pytest.raises(DataError) as caught:
        next(loader)
    assert str(caught.value).startswith(
        "5 pictures in a row cannot be read (data.max_bad_in_row); the last one is made"
    )
    assert str(caught.value).endswith("in 0.tar: decode_unsupported")
    assert "\n" not in str(caught.value)


def test_a_blank_picture_is_a_picture(tmp_path: Path):
    blank = io.BytesIO()
    Image.new("L", (30, 30)).save(blank, "PNG")
    of = resolved(write_tars(tmp_path, num_tars=1, bad={2: blank.getvalue()}))
    assert [batch.bad for batch in batches(of)] == [[]] * 9


def test_a_worker_that_is_killed_ends_the_run_in_one_line(tars: Path):
    of = resolved(tars, data={"num_workers": 2, "prefetch": 1}, schedule={"length": 1000})
    with Loader(of, Index.open(of.data), rank=0, world=1, start_step=0) as loader:
        next(loader)
        worker = multiprocessing.active_children()[-1]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"a worker of the loader is gone \(exit code -9\)") as caught:
            list(loader)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def _dies_in_the_midst(pipe: Connection) -> None:
    os.write(pipe.fileno(), (1000).to_bytes(4) + b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_while_it_hands_over_a_batch_ends_the_run():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_dies_in_the_midst, args=(theirs,))
    process.start()
    theirs.close()
    with pytest.raises(DataError, match="a worker of the loader is gone"):
        next(_in_order([_Worker(process, ours)], range(3), prefetch=1))


def test_a_worker_that_ends_before_it_is_asked_ends_the_run():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=os.getpid)
    process.start()
    theirs.close()
    process.join()
    with pytest.raises(DataError, match=r"a worker of the loader is gone \(exit code 0\)"):
        next(_in_order([_Worker(process, ours)], range(3), prefetch=1))


def test_a_closed_loader_leaves_no_worker(tars: Path):
    of = resolved(tars, data={"num_workers": 1, "prefetch": 1})
    loader = Loader(of, Index.open(of.data), rank=0, world=1, start_step=0)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    next(loader)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 30
    assert not psutil.pid_exists(worker.pid)
    assert list(loader) == []


# Sizes


def test_a_batch_that_cannot_be_cut_is_refused(tars: Path):
    with pytest.raises(ConfigError, match=r"data\.batch_size 8 must be a multiple of the number of processes, 3"):
        batches(resolved(tars), world=3)
    with pytest.raises(ConfigError, match=r"must divide the 4 pictures of a process .*; allowed: 1, 2, 4"):
        batches(resolved(tars, data={"micro_batch_size": 3}), world=2)
    assert micro_batches(resolved(tars, data={"micro_batch_size": 2}), 2) == (2, 2)


def test_big_pictures_are_decoded_smaller_but_never_below_what_crops_need(tmp_path: Path):
    views = ViewConfig()
    shortest = decode_shortest_px(views, None)
    assert shortest == 458  # 224 / sqrt(0.32 x 0.75)
    assert decode_shortest_px(views, 448) == 915
    assert decode_shortest_px(ViewConfig(local_px=224), None) == 579  # half of 224 / sqrt(0.05 x 0.75)
    assert (2 * shortest) ** 2 < MAX_PIXELS
    folder = write_tars(tmp_path, num_tars=1, bad={0: jpeg(0, 1840, 2000)})
    of = resolved(folder)
    reader = Reader(Index.open(of.data), of.data, seed=0, shortest_px=shortest)
    sides = {sample.key[-3:]: sample.rgb.shape for sample in map(reader.read, range(6))}
    assert sides["000"] == (920, 1000, 3)
    assert sides["001"] == (40, 56, 3)


# Real pictures


def test_real_pictures_are_read(tmp_path: Path, shared_data: Path):
    location = str(shared_data / "pool_caltech_background_80.tar")
    of = resolved(tmp_path, data={"parts": {"made": {"kind": "tars", "location": location}}})
    found = batches(of)
    assert len({key for batch in found for key in batch.keys}) == 72
    assert all(not batch.bad for batch in found)
