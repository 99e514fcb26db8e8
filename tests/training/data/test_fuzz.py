"""Mutated real files: each gives a Picture or a known reason, and the decoder goes on."""

import io
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.safety.look import hash_row
from curation.schema import TABLES
from training.data.pixels import FORMATS, REASONS, DecodeError, Picture
from training.data.sandbox import DecoderProcess

ROW_EVERY = 5  # pictures
EXTREMES = (b"\0\0", b"\0\1", b"\1\0", b"\xff\xff", b"\x7f\xff", b"\xff\x7f", b"\x80\0", b"\0\x80")


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def own_seeds() -> list[bytes]:
    """Every format that is decoded, in every mode that Pillow writes of it, and as animation where it can be one."""
    from skimage import data

    photo = Image.fromarray(data.chelsea()).resize((48, 36))
    seeds = []
    for name in FORMATS:
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"):
            try:
                image = photo.convert("L").convert(mode) if mode in ("I", "I;16", "F") else photo.convert(mode)
                seeds.append(saved(image, name))
            except (OSError, ValueError, KeyError):  # no such mode of this format
                continue
    frames = [photo.rotate(angle) for angle in (0, 90, 180)]
    for name in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        seeds.append(saved(frames[0], name, save_all=True, append_images=frames[1:]))
    for compression in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits"):
        seeds.append(saved(photo, "TIFF", compression=compression))
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({"progressive": True}, {"exif": exif}, {"subsampling": 0, "restart_marker_blocks": 2}):
        seeds.append(saved(photo, "JPEG", **options))
    seeds.append(saved(photo, "WEBP", lossless=True))
    return seeds


def mutated(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """One file, changed in one to three ways."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.integers(1, 4)):
        size = len(data)
        if size < 8:
            break
        kind = rng.integers(7)
        at = int(rng.integers(size))
        if kind == 0:  # bytes anywhere
            for place in rng.integers(size, size=rng.integers(1, 9)):
                data[place] = rng.integers(256)
        elif kind == 1:  # one bit
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:  # cut off, or a piece missing
            del data[at : at + int(rng.integers(1, size)) if rng.integers(2) else size]
        elif kind == 3:  # the end of another file
            other = seeds[rng.integers(len(seeds))]
            data[at:] = other[int(rng.integers(len(other))) :]
        elif kind == 4:  # fields of the header
            for place in rng.integers(min(size, 64), size=rng.integers(1, 4)):
                data[place] = rng.integers(256)
        elif kind == 5:  # sizes, counts and offsets
            place = int(rng.integers(min(size - 2, 256)))
            extreme = EXTREMES[rng.integers(len(EXTREMES))]
            data[place : place + 2] = extreme
        else:  # a piece twice
            piece = data[at : at + int(rng.integers(1, 200))]
            data[at:at] = piece
    return with_checksums(bytes(data)) if rng.integers(2) else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are sound again, so that a change gets past the first check."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + struct.unpack_from(">I", out, at)[0]
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(bytes(out[at + 4 : end])))
        at = end + 4
    return bytes(out)


def run(seeds: list[bytes], num_inputs: int, seed: int) -> tuple[Counter[str], int]:
    """Outcomes, and how many children died; some of the pictures become rows of the table of hashes."""
    decoder = DecoderProcess(max_pixels=4_000_000, max_seconds=5)
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    rows = []
    for _ in range(num_inputs):
        try:
            picture = decoder.decode(mutated(rng, seeds))
        except DecodeError as error:
            outcomes[error.reason] += 1
        else:
            assert isinstance(picture, Picture)
            assert picture.rgb.shape == (picture.height_px, picture.width_px, 3)
            outcomes["picture"] += 1
            if outcomes["picture"] % ROW_EVERY == 0:
                rows.append({"image_id": len(rows), "sha256": "", **hash_row(picture)})
    decoder.close()
    assert set(outcomes) <= {"picture", *REASONS}
    assert len(rows) == outcomes["picture"] // ROW_EVERY > 0
    assert pa.Table.from_pylist(rows, schema=TABLES["hashes"].schema).num_rows == len(rows)
    return outcomes, decoder.deaths


def test_hundreds_of_mutated_files() -> None:
    outcomes, deaths = run(own_seeds(), 400, seed=0)
    assert (deaths, outcomes["decode_timeout"], outcomes["decode_crashed"]) == (0, 0, 0)
    assert min(outcomes[name] for name in ("picture", "decode_corrupt", "decode_truncated")) > 20


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_fifty_thousand_mutated_files(shared_data, capfd) -> None:
    seeds = own_seeds()
    for name, most in (("odd_files_shared.tar", 8_000), ("curated_caltech101_6perclass.tar", 12_000)):
        with tarfile.open(shared_data / name) as tar:
            small = [member for member in tar if member.size < most and not member.name.endswith(".csv")]
            seeds += [tar.extractfile(member).read() for member in small[:400]]
    outcomes, deaths = run(seeds, 50_000, seed=1)
    assert capfd.readouterr() == ("", "")
    with capfd.disabled():
        print(f"\n{sum(outcomes.values()):,} mutated files of {len(seeds)}: {dict(outcomes)}, {deaths} children died")
    assert (deaths, outcomes["decode_timeout"], outcomes["decode_crashed"]) == (0, 0, 0)
