import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from training.data.pixels import REASONS, DecodeError, decode, encode_jpeg, resize_shortest

GRADIENT = np.stack((*np.meshgrid(np.arange(64), np.arange(48), indexing="xy"), np.full((48, 64), 49)), axis=2)
RGB = np.ascontiguousarray(GRADIENT * 2).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_pixel_by_pixel(kind):
    picture = decode(saved(Image.fromarray(RGB), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert picture.format == kind.lower()
    assert (picture.width_px, picture.height_px, picture.num_frames) == (64, 48, 1)
    np.testing.assert_array_equal(picture.rgb, RGB)


def test_cmyk_grey_and_palette_become_rgb():
    cmyk = decode(saved(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.rgb.astype(int) - RGB).mean() < 6
    grey = decode(saved(Image.fromarray(RGB).convert("L"), "PNG"))
    assert (grey.rgb[:, :, 0] == grey.rgb[:, :, 2]).all()
    palette = decode(saved(Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"))
    assert np.abs(palette.rgb.astype(int) - RGB).mean() < 12


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    picture = decode(saved(Image.fromarray(values), "PNG"))
    np.testing.assert_allclose(picture.rgb[:, :, 1], values / 257.0, atol=0.51)


def test_transparency_is_laid_on_white():
    rgba = np.dstack([RGB, np.zeros((48, 64), np.uint8)])
    assert (decode(saved(Image.fromarray(rgba, "RGBA"), "PNG")).rgb == 255).all()


def test_the_first_frame_of_an_animation_is_taken_and_the_rest_counted():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    picture = decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert picture.num_frames == 3
    assert picture.rgb[0, 0].tolist() == [255, 0, 0]


def test_what_is_cut_off_is_no_picture():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    for kind in ("JPEG", "PNG"):
        data = saved(noise, kind)
        assert reason_of(data[: int(len(data) * 0.6)]) == "decode_truncated"


def test_a_bomb_is_refused_before_it_asks_for_memory():
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    assert reason_of(bomb) == "decode_too_many_pixels"
    assert reason_of(saved(Image.fromarray(RGB), "PNG"), max_pixels=64 * 48 - 1) == "decode_too_many_pixels"


def test_what_is_no_picture_says_so():
    assert reason_of(b"<html>not a picture</html>") == "decode_unsupported"
    assert reason_of(b"") == "decode_unsupported"
    assert reason_of(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4) in ("decode_corrupt", "decode_truncated")


def test_a_decode_that_takes_too_long_is_ended():
    big = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (3000, 3000, 3), np.uint8)), "PNG")
    assert reason_of(big, max_seconds=0.001) == "decode_timeout"


def test_every_exif_orientation_gives_the_same_picture(shared_data):
    with tarfile.open(shared_data / "exif_orientation_landscape.tar") as tar:
        pictures = {m.name: decode(tar.extractfile(m).read()).rgb for m in tar if m.name.endswith(".jpg")}
    assert len(pictures) == 9
    reference = next(iter(pictures.values())).astype(int)
    for name, rgb in pictures.items():
        assert rgb.shape == reference.shape, name
        assert np.abs(rgb - reference).mean() < 8, name


@pytest.mark.slow
def test_odd_and_hostile_files_end_in_a_picture_or_a_reason(shared_data, capfd):
    counts = dict.fromkeys(("picture", *REASONS), 0)
    with tarfile.open(shared_data / "odd_files_shared.tar") as tar:
        for member in tar:
            if member.name == "manifest.csv":
                continue
            try:
                picture = decode(tar.extractfile(member).read())
                assert picture.rgb.dtype == np.uint8
                assert picture.rgb.ndim == 3
                counts["picture"] += 1
            except DecodeError as error:
                counts[error.reason] += 1
    assert sum(counts.values()) == 729
    assert counts["picture"] > 300


def test_resize_shrinks_to_the_shortest_side_and_never_grows():
    assert resize_shortest(RGB, 24).shape == (24, 32, 3)
    assert resize_shortest(RGB, 500) is RGB


def test_an_encoded_jpeg_decodes_close_and_is_the_same_bytes_each_time():
    data = encode_jpeg(RGB, 95)
    assert data == encode_jpeg(RGB.copy(), 95)
    assert np.abs(decode(data).rgb.astype(int) - RGB).mean() < 2
