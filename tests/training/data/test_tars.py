import contextlib
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from training.data.tars import Member, TarError, TarWriter, members, read_member

MEMBERS = [("000000000.jpg", b"\xff\xd8picture"), ("000000000.json", b"{}"), ("a/b.png", b"x" * 1500), ("empty", b"")]


def written(path: Path, files: list[tuple[str, bytes]]) -> TarWriter:
    writer = TarWriter(path)
    for name, data in files:
        writer.add(name, data)
    writer.close()
    return writer


def test_offsets_are_where_the_bytes_are_and_tarfile_reads_the_same(tmp_path: Path):
    path = tmp_path / "a.tar"
    writer = TarWriter(path)
    offsets = [writer.add(name, data) for name, data in MEMBERS]
    writer.close()
    raw = path.read_bytes()
    for offset, (_, data) in zip(offsets, MEMBERS, strict=True):
        assert raw[offset : offset + len(data)] == data
    assert list(members(path)) == [Member(n, o, len(d)) for (n, d), o in zip(MEMBERS, offsets, strict=True)]
    with tarfile.open(path) as tar:
        assert [(info.name, tar.extractfile(info).read()) for info in tar] == MEMBERS
    assert (writer.num_members, writer.num_bytes) == (len(MEMBERS), len(raw))
    assert writer.sha256 == hashlib.sha256(raw).hexdigest()


def test_the_same_members_give_the_same_bytes(tmp_path: Path):
    first, second = written(tmp_path / "a.tar", MEMBERS), written(tmp_path / "b.tar", MEMBERS)
    assert first.sha256 == second.sha256
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    second.close()  # once more changes nothing
    assert first.num_bytes == second.num_bytes


def test_webdataset_reads_the_samples(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    files = []
    for n in range(3):
        files += [(f"{n:09d}.jpg", bytes([n] * (700 * n + 1))), (f"{n:09d}.json", json.dumps({"image_id": n}).encode())]
    written(tmp_path / "a.tar", files)
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    assert [len(sample["jpg"]) for sample in samples] == [1, 701, 1401]
    assert [json.loads(sample["json"])["image_id"] for sample in samples] == [0, 1, 2]


def test_read_member(tmp_path: Path):
    written(tmp_path / "a.tar", MEMBERS)
    assert read_member(tmp_path / "a.tar", "a/b.png") == b"x" * 1500
    with pytest.raises(TarError, match="no member 'c'"):
        read_member(tmp_path / "a.tar", "c")


def test_compressed_tars_are_read(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("x.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [member.name for member in members(tmp_path / "a.tar.gz")] == ["x.txt"]
    assert read_member(tmp_path / "a.tar.gz", "x.txt") == b"abc"


@pytest.mark.parametrize("num_bytes", [100, 700, 1500, 2100])
def test_a_cut_off_tar_is_an_error(tmp_path: Path, num_bytes: int):
    path = tmp_path / "a.tar"
    written(path, MEMBERS)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(TarError, match=r"a\.tar"):
        list(members(path))


def test_what_is_no_tar_is_an_error(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(TarError, match=r"a\.tar"):
        list(members(path))
    with pytest.raises(TarError, match="cannot be a member"):
        TarWriter(tmp_path / "b.tar").add("x" * 300, b"")


def test_a_damaged_header_in_the_middle_is_an_error_and_no_end(tmp_path: Path):
    path = tmp_path / "a.tar"
    writer = TarWriter(path)
    offsets = [writer.add(name, data) for name, data in MEMBERS]
    writer.close()
    stored = bytearray(path.read_bytes())
    stored[offsets[2] - 512] ^= 1
    path.write_bytes(stored)
    with pytest.raises(TarError, match=f"damaged or cut off, neither header nor end mark at byte {offsets[2] - 512:,}"):
        list(members(path))


def headers_of(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    info = tarfile.TarInfo("x.jpg")
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


@pytest.mark.parametrize(
    "stored",
    [
        headers_of(tarfile.GNUTYPE_LONGNAME, b"name\0") * 3000,
        headers_of(tarfile.XHDTYPE, b"9" * 5000 + b" a=b\n"),
        headers_of(tarfile.REGTYPE, b"", 1 << 70),
        headers_of(tarfile.REGTYPE, b"", -512),
        headers_of(b"?", b"", -512),
    ],
    ids=["nested", "pax", "huge", "negative", "negative of no kind"],
)
def test_headers_that_lead_nowhere_are_a_tar_error(tmp_path: Path, stored: bytes):
    (tmp_path / "a.tar").write_bytes(stored + b"\0" * 1024)
    with pytest.raises(TarError, match=r"^[^:]*a\.tar: [^:]") as caught:
        list(members(tmp_path / "a.tar"))
    assert str(caught.value).count("a.tar") == 1


@pytest.mark.parametrize("mode", ["gz", "xz", "bz2"])
def test_damaged_compression_is_a_tar_error(tmp_path: Path, mode: str):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{mode}") as tar:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.bin")
            data = hashlib.shake_256(bytes([n])).digest(2000)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole, stored = list(members(path)), path.read_bytes()
    for place in range(0, len(stored), 61):
        for damaged in (stored[:place], stored[:place] + bytes([stored[place] ^ 255]) + stored[place + 1 :]):
            path.write_bytes(damaged)
            try:  # what stands behind the end mark, such as gzip's checksum, is not read
                found = list(members(path))
            except TarError:
                continue
            assert found == whole
            with contextlib.suppress(TarError):
                read_member(path, "2.bin")
