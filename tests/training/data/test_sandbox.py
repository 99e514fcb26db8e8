"""The decoder in a child process: the same pictures and reasons, and what happens when the child dies or loops."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data import sandbox
from training.data.pixels import DecodeError, Picture, decode
from training.data.sandbox import NUM_SLOTS, SLOT_BYTES, DecoderProcess

ROOT = Path(__file__).resolve().parents[3]


def png(height: int, width: int, seed: int = 0, level: int = 6) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(out, "PNG", compress_level=level)
    return out.getvalue()


SLOW = png(2000, 2000, level=1)  # some tenths of a second


@pytest.fixture
def decoder():
    decoder = DecoderProcess()
    yield decoder
    decoder.close()


def reason_of(decoder: DecoderProcess, data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decoder.decode(data)
    assert caught.value.detail
    return caught.value.reason


def outcome(decode: Callable[..., Picture], data: bytes, shortest_px: int | None) -> tuple[Any, ...]:
    try:
        picture = decode(data, shortest_px=shortest_px)
    except DecodeError as error:
        return error.reason, error.detail
    assert picture.rgb.flags.c_contiguous
    assert picture.rgb.dtype == np.uint8
    told = picture.format, picture.num_frames, picture.width_px, picture.height_px
    return *told, picture.rgb.shape, picture.rgb.tobytes()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends_soon(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


def test_pictures_and_reasons_are_those_of_decode(decoder, shared_data) -> None:
    with tarfile.open(shared_data / "pool_coco_48.tar") as tar:
        files = [tar.extractfile(member).read() for member in tar.getmembers()[1:9]]
    for data in [*files, b"", b"<html>", png(8, 9)[:100], png(30, 40)]:
        for shortest_px in (None, 64):
            assert outcome(decoder.decode, data, shortest_px) == outcome(decode, data, shortest_px)
    assert decoder.deaths == 0


def test_a_picture_stays_as_it_is_while_others_are_decoded(decoder) -> None:
    files = [png(20, 30, seed) for seed in range(2 * NUM_SLOTS + 1)]
    pictures = [decoder.decode(data).rgb[2:, :, :] for data in files]
    for data, rgb in zip(files, pictures, strict=True):
        assert np.array_equal(rgb, decode(data).rgb[2:])
    del pictures, rgb
    first = decoder.decode(files[0]).rgb
    decoder.close()
    assert np.array_equal(decoder.decode(files[1]).rgb, decode(files[1]).rgb)
    assert np.array_equal(first, decode(files[0]).rgb)  # though its child is gone


def test_files_and_pictures_larger_than_what_is_shared(decoder) -> None:
    large = png(2400, 2400, level=0)
    assert len(large) > SLOT_BYTES
    assert np.array_equal(decoder.decode(large).rgb, decode(large).rgb)
    assert decoder.decode(png(3, 3)).width_px == 3


def test_limits_of_bytes_and_pixels() -> None:
    data = png(30, 40)
    decoder = DecoderProcess(max_bytes=len(data), max_pixels=30 * 40)
    assert decoder.decode(data).width_px == 40
    assert reason_of(decoder, data + b"\0") == "decode_too_many_bytes"
    decoder.close()
    assert reason_of(DecoderProcess(max_pixels=30 * 40 - 1), data) == "decode_too_many_pixels"


def test_a_child_that_takes_too_much_cpu_time_is_ended_by_the_kernel() -> None:
    decoder = DecoderProcess(max_seconds=0.02)
    small = png(4, 5)
    assert decoder.decode(small).width_px == 5
    first = decoder.pid
    assert reason_of(decoder, SLOW) == "decode_timeout"
    assert reason_of(decoder, SLOW) == "decode_timeout"
    assert decoder.deaths == 2  # one a picture: what takes too long is not tried again
    assert ends_soon(first)
    assert decoder.decode(small).width_px == 5
    decoder.close()


def test_a_child_that_hangs_without_using_cpu_is_ended_by_its_parent() -> None:
    decoder = DecoderProcess()
    decoder.decode(png(4, 5))
    sandbox._set_timeout(decoder._child._link, 0.5)  # only for the child that hangs: a busy machine makes others wait
    os.kill(decoder.pid, signal.SIGSTOP)
    assert reason_of(decoder, png(4, 5)) == "decode_timeout"
    assert decoder.decode(png(4, 5)).width_px == 5
    decoder.close()


def killer(decoder: DecoderProcess, times: int) -> threading.Thread:
    """Kills so many children of a decoder, each while it decodes."""

    def run() -> None:
        seen: set[int] = set()
        deadline = time.monotonic() + 60
        while len(seen) < times and time.monotonic() < deadline:
            pid = decoder.pid
            # it is past its start once the picture is in work: the parent has waited for its greeting
            if pid is not None and pid not in seen and cpu_of(pid) > started.get(pid, 1e9):
                os.kill(pid, signal.SIGKILL)
                seen.add(pid)
            elif pid is not None and pid not in started:
                started[pid] = cpu_of(pid)
            time.sleep(0.001)

    started: dict[int, float] = {}
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def cpu_of(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def test_a_child_killed_in_mid_picture_costs_nothing_once_and_a_row_twice(decoder) -> None:
    thread = killer(decoder, 1)
    assert np.array_equal(decoder.decode(SLOW).rgb, decode(SLOW).rgb)
    thread.join()
    assert decoder.deaths == 1
    decoder.close()
    thread = killer(decoder, 2)
    assert reason_of(decoder, SLOW) == "decode_crashed"
    thread.join()
    assert decoder.deaths == 3
    assert decoder.decode(png(4, 5)).width_px == 5


def test_out_of_memory_is_a_crash_and_the_next_picture_decodes() -> None:
    decoder = DecoderProcess(memory_bytes=330_000_000)
    small = png(4, 5)
    decoder.decode(small)
    out = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(out, "PNG")
    for _ in range(2):
        assert reason_of(decoder, out.getvalue()) == "decode_crashed"
        assert decoder.decode(small).width_px == 5
    decoder.close()


def test_the_child_ends_with_its_parent_and_with_its_decoder() -> None:
    program = (
        "import sys, time\n"
        "from training.data.sandbox import DecoderProcess\n"
        "decoder = DecoderProcess()\n"
        "decoder.decode(sys.stdin.buffer.read())\n"
        "print(decoder.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    parent.stdin.write(png(4, 5))
    parent.stdin.close()
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert ends_soon(pid)

    decoder = DecoderProcess()
    decoder.decode(png(4, 5))
    pid = decoder.pid
    del decoder
    assert ends_soon(pid)


def test_the_child_imports_little() -> None:
    code = "import sys, training.data.sandbox_child; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert {"numpy", "PIL", "simplejpeg"} <= set(names)
    assert not {"torch", "cv2", "ray", "pyarrow", "pydantic", "pillow_heif"} & set(names)


def test_a_child_that_does_not_start_says_why(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sandbox, "_ROOT", tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise ImportError('this machine lacks it')")
    with pytest.raises(RuntimeError, match=r"the decoder does not start: .*sandbox_child.*: ImportError: this machine"):
        DecoderProcess().decode(b"")
