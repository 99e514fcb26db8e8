"""Block lists: what a line may be, what a broken one says, and which pictures are named."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curation.safety.blocklist import read_block_list
from curation.safety.verdict import SafetyConfig, SafetyStage
from curation.schema import TABLES
from training.config import ConfigError

ONE, TWO, THREE = "0f" * 32, "f0" * 32, "aa" * 32


def flipped(pdq: str, num_bits: int) -> str:
    return f"{int(pdq, 16) ^ ((1 << num_bits) - 1):064x}"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to_file(text: str | bytes, name: str = "list.txt") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return to_file


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (f"# ours\n\n{ONE}\n  {TWO.upper()}  # by mail\n{ONE}\n", (ONE, TWO)),
        (f"\ufeff{ONE},99,./a picture.jpg\n{TWO},49,low\n{THREE},50,enough\n", (ONE, THREE)),
        (f"{ONE},from a partner\n{TWO},\n", (ONE, TWO)),
        (f"reason,quality,PDQ\nx,10,{ONE}\ny,,{TWO}\n", (TWO,)),
        (f"hash,id\n{ONE},0000000000000001\n", (ONE,)),
        ("", ()),
    ],
)
def test_lines_of_a_list_of_pdqs(write, text, entries):
    found = read_block_list("safety.blocked_pdq_files", "pdq", [write(text)], min_quality=50)
    assert found.entries == tuple(sorted(entries))


def test_lines_of_a_list_of_sha256(write):
    files = [write(f"sha256,reason\n{ONE},10\n", "a.csv"), write(f"{TWO},10\n{ONE}\n", "b.txt")]
    found = read_block_list("safety.blocked_sha256_files", "sha256", files)
    assert found.entries == (ONE, TWO)
    assert ONE in found
    assert THREE not in found


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("pdq", f"{ONE}\n{ONE[:-1]}\n", r"line 2: '0f.*0' is no PDQ; allowed: 64 hex digits"),
        ("sha256", "# x\nmd5\n", r"list\.txt line 2: 'md5' is no sha256; allowed: 64 hex digits"),
        ("pdq", f"quality,pdq\n99,{ONE}\n99\n", r"line 3: '' is no PDQ"),
        ("pdq", f"{ONE},101\n", r"line 1: quality is '101'; allowed: 0 to 100; a first line may name the columns"),
        ("pdq", f"{ONE},0000000000000001\n", r"line 1: quality is '0000000000000001'"),
        ("pdq", b"\xff\xfe", r"not UTF-8 at byte 0; give text files with one pdq a line"),
    ],
)
def test_a_broken_line_is_named(write, kind, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_block_list(f"safety.blocked_{kind}_files", kind, [write(text)])
    assert str(error.value).startswith(f"safety.blocked_{kind}_files: ")
    assert "\n" not in str(error.value)


def test_the_content_of_a_list_is_in_the_fingerprint_and_its_place_is_not(write):
    def values(*files: str, **others: Any) -> dict[str, Any]:
        return SafetyStage(SafetyConfig(blocked_pdq_files=files, **others)).fingerprint_values()

    one = values(write(f"{ONE},80\n{TWO},80\n"))
    assert one["blocked_pdq"]["entries"] == 2
    assert one == values(write(f"# moved\n{TWO}\n", "b.txt"), write(f"{ONE}\n", "c.txt"))
    assert one == values(write(f"{ONE},80\n{TWO},80\n{THREE},20\n", "d.txt"))
    assert one != values(write(f"{ONE}\n", "e.txt"))
    assert one != values(write(f"{ONE}\n{TWO}\n", "f.txt"), blocked_pdq_radius_bits=30)
    path = write(f"{ONE}\n{TWO}\n", "g.txt")
    assert one == values(path)
    write(f"{ONE}\n{THREE}\n{TWO}\n", "g.txt")  # the same file, read again because it changed
    assert one != values(path)


def test_a_list_that_cannot_be_read_stops_before_any_work(write):
    with pytest.raises(ConfigError, match=r"safety\.blocked_pdq_files: .* line 1: 'x' is no PDQ"):
        SafetyStage(SafetyConfig(blocked_pdq_files=[write("x\n")])).preflight()


class Tables:
    """The tables of one shard, as a stage reads them."""

    def __init__(self, role: str, hashes: list[dict[str, Any]]) -> None:
        self.role = role
        self.rows = pa.table({name: [row[name] for row in hashes] for name in ("image_id", "sha256")})
        ids = pa.array([row["image_id"] for row in hashes], pa.int64())
        seen = [{"image_id": image_id.as_py(), "class_scores": []} for image_id in ids]
        self._tables = {
            "hashes": pa.Table.from_pylist(hashes, schema=TABLES["hashes"].schema),
            "detections": pa.Table.from_pylist(seen, schema=TABLES["detections"].schema),
            "opinions": TABLES["opinions"].schema.empty_table(),
        }

    def table(self, name: str, columns: Any = None) -> pa.Table:
        return self._tables[name].select(columns)


@pytest.mark.parametrize("role", ["pool", "query"])
def test_what_a_list_names_is_dropped(write, role):
    def row(image_id: int, **values: Any) -> dict[str, Any]:
        seen = {
            "ok": True,
            "width_px": 400,
            "height_px": 300,
            "luma_std": 50.0,
            "flat_share": 0.1,
            "pdq": THREE,
            "pdq_quality": 100,
        }
        return {"image_id": image_id, "sha256": f"{image_id:064x}", **seen, **values}

    broken = {"ok": False, "reason": "decode_corrupt", "pdq": None, "pdq_quality": None}
    hashes = [
        row(1, pdq=flipped(ONE, 31), width_px=3),  # a list is asked first
        row(2, pdq=flipped(ONE, 32)),
        row(3, pdq=ONE, pdq_quality=49),
        row(4, pdq=ONE, sha256=TWO),  # the bytes say more than the look
        row(5, **broken),
        row(6, sha256=THREE, **broken),
        row(7),
    ]
    config = SafetyConfig(
        blocked_sha256_files=[write(f"{TWO}\n{THREE}\n", "sha256.txt")],
        blocked_pdq_files=[write(f"{ONE},100,known\n", "pdq.csv")],
    )
    out = SafetyStage(config).run(0, Tables(role, hashes))["safety"].to_pylist()
    reasons = [line["reason"] for line in out]
    if role == "query":
        assert reasons == [None, None, None, None, "decode_corrupt", "decode_corrupt", None]
        return
    expected = ["blocked_pdq", None, None, "blocked_sha256", "decode_corrupt", "blocked_sha256", None]
    assert reasons == expected
    assert (out[0]["score"], out[0]["threshold"], out[0]["keep"]) == (31.0, 31.0, False)
    assert (out[3]["score"], out[3]["threshold"]) == (None, None)
