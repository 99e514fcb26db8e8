"""The decode policy: every row of its table, and that nothing but a Picture or a DecodeError ever comes out."""

import io
import signal
import struct
import tarfile
import time
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageCms

from training.data import modes, pixels
from training.data.pixels import (
    FORMATS,
    MAX_FRAMES,
    MAX_SCANS,
    MAX_SIDE_PX,
    DecodeError,
    decode,
    encode_jpeg,
    resize_shortest,
)


def gradient(height: int = 60, width: int = 90) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=2).astype(np.uint8)


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def reason_of(data: bytes, **options: object) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, **options)
    assert caught.value.detail
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_what_pillow_gives(name: str) -> None:
    options = {"lossless": True} if name == "WEBP" else {}
    data = saved(Image.fromarray(gradient()), name, **options)
    picture = decode(data)
    assert np.array_equal(picture.rgb, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert (picture.format, picture.num_frames) == (name.lower(), 1)
    assert (picture.width_px, picture.height_px) == (90, 60)
    assert picture.rgb.dtype == np.uint8
    assert picture.rgb.flags.c_contiguous


@pytest.mark.parametrize("name", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_every_format(name: str, orientation: int) -> None:
    upright = gradient()
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # what undoes an orientation
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(methods[back[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if name == "JPEG" else {"lossless": True} if name == "WEBP" else {}
    picture = decode(saved(image, name, exif=exif, **options))
    assert (picture.width_px, picture.height_px) == (90, 60)
    assert np.abs(picture.rgb.astype(int) - upright).max() <= (6 if name == "JPEG" else 0)


def test_nine_real_photos_under_every_orientation_come_out_equal(shared_data) -> None:
    with tarfile.open(shared_data / "exif_orientation_landscape.tar") as tar:
        pictures = [
            decode(tar.extractfile(member).read()) for member in tar.getmembers() if not member.name.endswith(".csv")
        ]
    assert len(pictures) == 9
    first = resize_shortest(pictures[0].rgb, 100).astype(int)
    for picture in pictures:
        assert picture.rgb.shape == pictures[0].rgb.shape
        # each was saved as a JPEG of its own
        assert np.abs(resize_shortest(picture.rgb, 100).astype(int) - first).mean() < 3


def test_a_broken_exif_block_is_ignored() -> None:
    data = saved(Image.fromarray(gradient()), "JPEG")
    block = b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01" * 20
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert np.array_equal(decode(broken).rgb, decode(data).rgb)


def test_cmyk_is_rgb() -> None:
    image = Image.fromarray(gradient()).convert("CMYK")
    picture = decode(saved(image, "JPEG", quality=100, subsampling=0))
    assert np.abs(picture.rgb.astype(int) - np.asarray(image.convert("RGB")).astype(int)).mean() < 3


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(name: str) -> None:
    values = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    picture = decode(saved(Image.fromarray(values), name))
    expected = np.rint(values / 257.0).astype(np.uint8)
    assert np.array_equal(picture.rgb, np.repeat(expected[:, :, None], 3, axis=2))


def test_big_endian_16_bit_is_scaled_too() -> None:
    values = np.linspace(0, 65535, 60 * 90).astype(">u2").reshape(60, 90)
    image = Image.frombytes("I;16B", (90, 60), values.tobytes())
    assert np.array_equal(decode(saved(image, "TIFF")).rgb[:, :, 0], np.rint(values / 257.0).astype(np.uint8))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 1000, 65535]], np.int32), [0, 4, 255]),
        (np.array([[0, 1 << 20, 1 << 21]], np.int32), [0, 128, 255]),
        (np.array([[-10, 0, 10]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-3.0, -3.0, -3.0]], np.float32), [0, 0, 0]),
        (np.array([[0.0, np.nan, 1.0]], np.float32), [0, 0, 255]),
    ],
)
def test_wide_greys_use_their_own_range(values: np.ndarray, expected: list[int]) -> None:
    assert decode(saved(Image.fromarray(values), "TIFF")).rgb[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(mode: str) -> None:
    image = Image.new(mode, (4, 4), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.putpixel((1, 1), (10, 20, 30, 255) if mode == "RGBA" else (10, 255))
    image.putpixel((2, 2), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
    rgb = decode(saved(image, "PNG")).rgb
    assert rgb[0, 0].tolist() == [255, 255, 255]
    assert rgb[1, 1].tolist() == ([10, 20, 30] if mode == "RGBA" else [10, 10, 10])
    assert abs(int(rgb[2, 2, 0]) - 127) <= 1


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_palette_and_its_transparent_colour(name: str) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.putpixel((0, 0), 0)
    assert decode(saved(image, name)).rgb[0, 0].tolist() == [200, 0, 0]
    rgb = decode(saved(image, name, transparency=0)).rgb
    assert rgb[0, 0].tolist() == [255, 255, 255]
    assert rgb[1, 1].tolist() == [0, 100, 0]


def test_one_bit_and_grey_have_three_equal_channels() -> None:
    for mode in ("1", "L"):
        rgb = decode(saved(Image.fromarray(gradient()).convert(mode), "PNG")).rgb
        assert rgb.shape == (60, 90, 3)
        assert np.array_equal(rgb[:, :, 0], rgb[:, :, 1])
        assert np.array_equal(rgb[:, :, 0], rgb[:, :, 2])


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(name: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if name == "WEBP" else {}
    picture = decode(saved(frames[0], name, save_all=True, append_images=frames[1:], **options))
    assert picture.num_frames == 3
    assert picture.rgb[5, 5].tolist() == [250, 0, 0]


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_a_number_of_frames_is_no_claim_of_the_file() -> None:
    data = saved(Image.fromarray(gradient()), "PNG")
    for claim in (1001, 0x7FFFFFFF, 0x80000000):
        lying = data[:33] + png_chunk(b"acTL", struct.pack(">II", claim, 0)) + data[33:]
        assert decode(lying).num_frames == MAX_FRAMES
    assert decode(data[:33] + png_chunk(b"acTL", struct.pack(">II", 999, 0)) + data[33:]).num_frames >= 999


def many_directories(number: int) -> bytes:
    """A TIFF of so many pages, all of them the same pixels."""
    data = saved(Image.new("L", (4, 4), 7), "TIFF")
    first = struct.unpack_from("<I", data, 4)[0]
    entries = data[first : first + 2 + 12 * struct.unpack_from("<H", data, first)[0]]
    size = len(entries) + 4
    out = data[:4] + struct.pack("<I", len(data)) + data[8:]
    ends = (len(data) + size * place for place in range(1, number))
    return out + b"".join(entries + struct.pack("<I", end) for end in ends) + entries + bytes(4)


def test_pages_are_counted_up_to_a_limit_and_not_all_of_them_read() -> None:
    assert decode(many_directories(3)).num_frames == 3
    assert decode(many_directories(MAX_FRAMES - 1)).num_frames == MAX_FRAMES - 1
    started = time.process_time()
    assert decode(many_directories(45_000)).num_frames == MAX_FRAMES
    assert time.process_time() - started < 3  # all of them take 13 s


def with_scans(number: int) -> bytes:
    """A progressive JPEG, its last scan there so often that they are this many."""
    data = saved(Image.new("RGB", (16, 16), (9, 99, 200)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    before = data.count(b"\xff\xda") - 1
    return data[:last] + (number - before) * data[last:-2] + data[-2:]


def test_a_jpeg_of_hundreds_of_scans_is_refused_and_metadata_that_look_like_them_are_not() -> None:
    assert decode(with_scans(MAX_SCANS)).width_px == 16
    assert reason_of(with_scans(MAX_SCANS + 1)) == "decode_timeout"
    data = saved(Image.fromarray(gradient()), "JPEG")
    noise = b"\xff\xe5" + struct.pack(">H", 2002) + b"\xff\xda" * 1000
    assert np.array_equal(decode(data[:2] + noise + data[2:]).rgb, decode(data).rgb)
    assert np.array_equal(decode(data + b"\xff\xda" * 1000 + b"\xff\xd9").rgb, decode(data).rgb)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_a_file_of_several_pictures_says_that_it_does_not_show_all(name: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = saved(frames[0], name, save_all=True, append_images=frames[1:])
    assert not decode(data).shows_all
    if name != "MPO":
        assert decode(saved(frames[0], name)).shows_all
    if name == "TIFF":  # its second page cannot be read
        at = struct.unpack_from("<I", data, 4)[0]
        end = at + 2 + 12 * struct.unpack_from("<H", data, at)[0]
        broken = decode(data[:end] + struct.pack("<I", len(data) + 9) + data[end + 4 :])
        assert (broken.num_frames, broken.shows_all) == (1, False)


@pytest.mark.parametrize(("mode", "name"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_what_alpha_hides_is_told(mode: str, name: str) -> None:
    image = Image.fromarray(gradient()).convert(mode)
    assert decode(saved(image, name)).shows_all
    image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], 254))
    assert not decode(saved(image, name, **({"lossless": True} if name == "WEBP" else {}))).shows_all


def test_a_transparent_palette_entry_or_colour_may_hide_pixels() -> None:
    palette = Image.fromarray(gradient()).convert("P")
    for name in ("PNG", "GIF"):
        assert decode(saved(palette, name)).shows_all
        assert not decode(saved(palette, name, transparency=palette.getpixel((0, 0)))).shows_all
    assert not decode(saved(Image.fromarray(gradient()), "PNG", transparency=(1, 2, 3))).shows_all


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_off_is_truncated(name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    data = saved(Image.fromarray(noise), name)
    assert reason_of(data[: int(len(data) * share)]) == "decode_truncated"


def test_a_jpeg_without_its_last_bytes_is_truncated_too() -> None:
    for progressive in (False, True):
        data = saved(Image.fromarray(gradient()), "JPEG", progressive=progressive)
        assert reason_of(data[:-2]) == "decode_truncated"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("shortest_px", [None, 20])
def test_an_end_mark_makes_no_whole_picture_of_a_cut_off_jpeg(mode, progressive, shortest_px) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    data = saved(Image.fromarray(noise).convert(mode), "JPEG", progressive=progressive)
    assert decode(data, shortest_px=shortest_px).width_px == 160
    cut = data[: len(data) // 2] + b"\xff\xd9"
    assert reason_of(cut, shortest_px=shortest_px) == "decode_truncated"


def test_stray_bytes_in_a_photograph_cost_it_nothing() -> None:
    data = saved(Image.fromarray(gradient()), "JPEG")
    picture = decode(data[:-2] + b"\0\0\0" + data[-2:])  # as some cameras write them
    assert np.array_equal(picture.rgb, decode(data).rgb)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html><body>not found</body></html>", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
)
def test_no_picture_is_unsupported(data: bytes) -> None:
    assert reason_of(data) == "decode_unsupported"


def test_formats_outside_the_list_are_unsupported() -> None:
    image = Image.fromarray(gradient())
    for name in ("PPM", "TGA", "ICO", "JPEG2000"):
        assert reason_of(saved(image, name)) == "decode_unsupported"


def test_nonsense_behind_a_good_header_is_corrupt() -> None:
    data = bytearray(saved(Image.fromarray(gradient()), "PNG"))
    at = data.index(b"IDAT") + 6
    data[at : at + 40] = b"\xa5" * 40
    assert reason_of(bytes(data)) == "decode_corrupt"


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def test_a_bomb_is_told_by_its_header() -> None:
    import resource

    data = saved(Image.new("1", (40_000, 4_000)), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_of(data) == "decode_too_many_pixels"
    end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert reason_of(png_header(1_000_000, 1_000_000) + end) == "decode_too_many_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_limits_of_pixels_and_sides() -> None:
    data = saved(Image.fromarray(gradient()), "PNG")
    assert decode(data, max_pixels=60 * 90).width_px == 90
    assert reason_of(data, max_pixels=60 * 90 - 1) == "decode_too_many_pixels"
    assert decode(saved(Image.new("L", (MAX_SIDE_PX, 2)), "PNG")).width_px == MAX_SIDE_PX
    assert reason_of(saved(Image.new("L", (MAX_SIDE_PX + 1, 2)), "PNG")) == "decode_too_many_pixels"


def test_a_slow_picture_ends_in_a_timeout_and_an_older_timer_goes_on() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    data = saved(Image.fromarray(noise), "PNG", compress_level=1)
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    assert reason_of(data, max_seconds=0.001) == "decode_timeout"
    assert signal.getsignal(signal.SIGALRM) is handler
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    assert (left > 0) == (timer[0] > 0)
    assert left <= timer[0]


def test_shortest_px_scales_a_jpeg_by_powers_of_two_only() -> None:
    rgb = np.repeat(np.repeat(gradient(100, 150), 8, axis=0), 8, axis=1)
    data = saved(Image.fromarray(rgb), "JPEG", quality=95)
    for target, shape in (
        (50, (100, 150)),
        (51, (200, 300)),
        (200, (400, 600)),
        (201, (800, 1200)),
        (900, (800, 1200)),
    ):
        picture = decode(data, shortest_px=target)
        assert picture.rgb.shape[:2] == shape
        assert (picture.width_px, picture.height_px) == (1200, 800)
    full = resize_shortest(decode(data).rgb, 100).astype(int)
    assert np.abs(resize_shortest(decode(data, shortest_px=100).rgb, 100).astype(int) - full).mean() < 2


def real_jpegs(shared_data) -> list[bytes]:
    files = []
    for name, step in (("pool_imagenet_300", 15), ("pool_coco_48", 6), ("pool_caltech_background_80", 8),
                       ("curated_flowers5_17perclass", 9), ("copies_pdq_imagededup", 5), ("odd_files_shared", 1),
                       ("exif_orientation_landscape", 3)):  # fmt: skip
        with tarfile.open(shared_data / f"{name}.tar") as tar:
            found = [tar.extractfile(member).read() for member in tar.getmembers()[1::step]]
        files += [data for data in found if data.startswith(b"\xff\xd8\xff")]
    return files


@pytest.mark.parametrize("shortest_px", [None, 40])
def test_the_fast_way_gives_what_the_slow_way_gives(shared_data, monkeypatch, shortest_px) -> None:
    files = real_jpegs(shared_data)
    fast = [outcome(data, shortest_px) for data in files]
    num_fast = 0

    def by_pillow(*args: object) -> None:
        nonlocal num_fast
        num_fast += plain_jpeg(*args) is not None

    plain_jpeg = pixels._plain_jpeg
    monkeypatch.setattr(pixels, "_plain_jpeg", by_pillow)
    for data, found in zip(files, fast, strict=True):
        assert outcome(data, shortest_px) == found
    assert len(files) > 150
    assert num_fast > 0.7 * len(files)


def outcome(data: bytes, shortest_px: int | None) -> tuple[object, ...]:
    try:
        picture = decode(data, shortest_px=shortest_px)
    except DecodeError as error:
        return error.reason, error.detail
    return picture.rgb.shape, picture.width_px, picture.height_px, picture.rgb.tobytes()


@pytest.mark.parametrize("block_pixels", [1, 1000])
def test_blocks_of_rows_change_nothing(monkeypatch, block_pixels) -> None:
    photo = Image.fromarray(gradient())
    palette = photo.convert("P")
    files = [saved(palette, "PNG"), saved(palette, "PNG", transparency=3), saved(photo.convert("RGBA"), "PNG")]
    files += [saved(photo.convert(mode), "TIFF") for mode in ("CMYK", "LAB", "L", "1", "F", "I")]
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        files.append(saved(photo, "PNG", exif=exif))
    whole = [outcome(data, None) for data in files]
    monkeypatch.setattr(modes, "BLOCK_PIXELS", block_pixels)
    assert [outcome(data, None) for data in files] == whole


def cmyk_profile() -> bytes:
    """An ICC profile of a printer (ICC.1:2001-04, lut8Type) whose cyan ink is green; other inks are black."""
    fixed = [struct.pack(">i", round(value * 65536)) for value in (0.9642, 1.0, 0.8249)]
    identity = b"".join(struct.pack(">i", 65536 * (row == column)) for row in range(3) for column in range(3))
    table = b""
    for place in range(16):  # C is the slowest digit, K the fastest; Lab as 0..255, 128 for a = b = 0
        table += bytes((255, 128, 128) if place == 0 else (153, 68, 188) if place == 8 else (0, 128, 128))
    ramp = bytes(range(256))
    lut = b"mft1" + bytes((0, 0, 0, 0, 4, 3, 2, 0)) + identity + 4 * ramp + table + 3 * ramp
    size = 128 + 4 + 12 + len(lut)
    header = struct.pack(">I4sI4s4s4s12x4s28x", size, b"", 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    header = (header + b"".join(fixed)).ljust(128, b"\0")
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


@pytest.mark.parametrize(("name", "options"), [("JPEG", {"quality": 100, "subsampling": 0}), ("TIFF", {})])
def test_cmyk_is_converted_by_its_profile(name: str, options: dict[str, object]) -> None:
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, 16:32, 0] = 255  # cyan
    inks[:, 32:, 3] = 255  # black
    image = Image.fromarray(inks, "CMYK")
    profile = cmyk_profile()
    white, green, black = decode(saved(image, name, icc_profile=profile, **options)).rgb[8, [8, 24, 40]].astype(int)
    assert white.min() >= 250
    assert black.max() <= 5
    assert green[1] > green[0] + 80
    assert green[1] > green[2] + 80
    cyan = decode(saved(image, name, **options)).rgb[8, 24].astype(int)
    assert cyan[2] > cyan[0] + 80  # without a profile: Pillow's formula
    # none of these can be used: cut off, of another colour space, no profile at all
    for broken in (profile[:300], ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"CMYK" * 9):
        assert np.array_equal(decode(saved(image, name, icc_profile=broken, **options)).rgb[8, 24], cyan)


def test_a_profile_of_rgb_is_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.fromarray(gradient())
    assert np.array_equal(decode(saved(image, "PNG", icc_profile=profile)).rgb, gradient())


def test_too_many_bytes() -> None:
    data = saved(Image.fromarray(gradient()), "PNG")
    assert decode(data, max_bytes=len(data)).width_px == 90
    assert reason_of(data, max_bytes=len(data) - 1) == "decode_too_many_bytes"


def test_decoders_that_need_much_memory_take_fewer_pixels(monkeypatch) -> None:
    monkeypatch.setattr(pixels, "HEAVY_PIXELS", 60 * 90 - 1)
    image = Image.fromarray(gradient())
    for name, options in (("WEBP", {}), ("AVIF", {}), ("JPEG", {"progressive": True})):
        assert reason_of(saved(image, name, **options)) == "decode_too_many_pixels"
    for name in ("JPEG", "PNG", "GIF", "TIFF", "BMP"):
        assert decode(saved(image, name)).width_px == 90


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_heif_without_its_extra_is_unsupported_and_says_what_to_install() -> None:
    with pytest.raises(DecodeError, match=r"decode_unsupported: HEIF: pip install 'lvd\[heif\]'"):
        decode(HEIC)


def test_heif_with_its_extra() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    for orientation, shape in ((1, (60, 90, 3)), (6, (90, 60, 3))):
        exif[0x0112] = orientation
        data = saved(Image.fromarray(gradient()), "HEIF", quality=100, chroma=444, exif=exif.tobytes())
        picture = decode(data)
        assert (picture.format, picture.num_frames, picture.rgb.shape) == ("heif", 1, shape)
        upright = gradient() if orientation == 1 else np.rot90(gradient(), -1)
        assert np.abs(picture.rgb.astype(int) - upright).mean() < 3
        assert reason_of(data[: len(data) // 2]) == "decode_truncated"
    assert reason_of(HEIC) == "decode_corrupt"


def test_resize_shortest() -> None:
    rgb = gradient(60, 90)
    assert resize_shortest(rgb, 30).shape == (30, 45, 3)
    assert resize_shortest(rgb, 60) is rgb
    assert resize_shortest(rgb, 200) is rgb
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    photo = np.repeat(np.repeat(gradient(300, 401), 2, axis=0), 2, axis=1)
    photo ^= np.random.default_rng(0).integers(0, 64, photo.shape, np.uint8)
    for shortest_px in (599, 288, 71, 2):
        small = resize_shortest(photo, shortest_px)
        by_pillow = Image.fromarray(photo).resize(small.shape[1::-1], Image.Resampling.BICUBIC)
        assert np.abs(small.astype(int) - np.asarray(by_pillow)).max() <= 2
        assert small.flags.c_contiguous
        assert np.array_equal(resize_shortest(np.asfortranarray(photo), shortest_px), small)
    flat = resize_shortest(np.repeat(checks[:, :, None], 3, axis=2), 16)
    assert np.ptp(flat) <= 1  # antialiased: a checkerboard becomes grey


def test_encode_jpeg_is_the_same_every_time_and_holds_no_metadata() -> None:
    rgb = gradient()
    data = encode_jpeg(rgb, 95)
    assert data == encode_jpeg(rgb.copy(), 95)
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    assert not image.getexif()
    assert np.abs(decode(data).rgb.astype(int) - rgb).mean() < 4
    assert len(encode_jpeg(rgb, 50)) < len(data)
