import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sample_web import photos
from pipelines.sample_web.build import build, clashes, phash_of
from pipelines.sample_web.config import SampleWebConfig
from pipelines.sample_web.plant import file_of, num_benchmark, num_pictures
from pipelines.sample_web.truth import KIND_OF, KINDS, counts, read_truth
from training.config import ConfigError


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SampleWebConfig(path=str(tmp_path_factory.mktemp("web") / "site"), urls=200))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(site: Path) -> list[dict]:
    return read_truth(site).to_pylist()


def test_same_values_same_bytes_and_built_once(site: Path, tmp_path: Path):
    again = SampleWebConfig(path=str(tmp_path / "again"), urls=200)
    folder = build(again)
    assert digests(folder) == digests(site)
    marker = folder / "benchmark" / "00000.jpg"
    marker.write_bytes(b"left alone")
    assert build(again) == folder
    assert marker.read_bytes() == b"left alone"
    assert list(tmp_path.iterdir()) == [folder]


def test_digest_follows_values_and_nothing_else():
    plain = SampleWebConfig().digest()
    assert SampleWebConfig(path="elsewhere", workers=3).digest() == plain
    assert SampleWebConfig(seed=1).digest() != plain
    assert SampleWebConfig(urls=201).digest() != plain


def test_every_kind_is_there_and_the_list_says_what_truth_says(site: Path):
    truth = rows(site)
    found = {kind: sum(row["kind"] == kind for row in truth) for kind in KIND_OF}
    assert found == counts(200)
    assert min(found.values()) >= 1
    with (site / "urls.csv").open(newline="", encoding="utf-8", errors="replace") as stream:
        listed = list(csv.DictReader(stream))
    assert [line["url"] for line in listed] == [row["url"] for row in truth]
    assert [row["line"] for row in truth] == list(range(200))
    assert json.loads((site / "sample_web.json").read_text())["kinds"] == found
    assert all((row["reason"] is None) == (row["end_stage"] == "kept") for row in truth)


def test_large_sites_keep_most_lines_plain():
    for num_urls in (200, 2000, 20_000):
        assert sum(counts(num_urls).values()) == num_urls
        num_copies = sum(counts(num_urls)[kind.name] for kind in KINDS if kind.needs == "copy")
        assert counts(num_urls)["base"] > num_copies


def test_no_two_pictures_look_alike(site: Path):
    files = [site / file_of(r["line"], r["kind"]) for r in rows(site) if r["kind"] in ("base", "slow_ok", "face")]
    files += [*(site / "queries").rglob("*.jpg"), *(site / "benchmark").glob("*.jpg")]
    hashes = np.array([phash_of(np.asarray(Image.open(path))) for path in files], np.uint64)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    np.fill_diagonal(distance, 64)
    assert distance.min() > 10


def test_the_base_of_a_copy_is_the_one_that_stays(site: Path):
    truth = rows(site)
    bases = [row["base_line"] for row in truth if KIND_OF[row["kind"]].needs == "copy"]
    assert len(bases) == len(set(bases))
    for row in truth:
        if KIND_OF[row["kind"]].needs == "copy":
            assert truth[row["base_line"]]["kind"] == "base"
            assert row["base_line"] < row["line"]
            assert row["scene"] == truth[row["base_line"]]["scene"]
        if row["kind"] in ("reencoded", "resized", "crop", "overlay"):
            base, copy = site / file_of(row["base_line"], "base"), site / file_of(row["line"], row["kind"])
            size = [(np.prod(Image.open(path).size), path.stat().st_size) for path in (copy, base)]
            assert size[0] < size[1]


def test_odd_files_are_what_they_say(site: Path):
    files = {row["kind"]: site / file_of(row["line"], row["kind"]) for row in rows(site)}
    assert Image.open(files["cmyk_jpeg"]).mode == "CMYK"
    assert Image.open(files["grey_jpeg"]).mode == "L"
    assert Image.open(files["alpha_png"]).mode == "RGBA"
    assert Image.open(files["webp"]).format == "WEBP"
    assert Image.open(files["animated_gif"]).n_frames == 3
    assert Image.open(files["exif_rotated"]).getexif()[0x0112] in (3, 6, 8)
    assert files["png16"].read_bytes()[24] == 16  # bit depth
    assert Image.open(files["tiny"]).size == (16, 16)
    width, height = Image.open(files["wide"]).size
    assert width / height > 8
    assert np.asarray(Image.open(files["blank"])).std(axis=(0, 1)).max() < 2
    bomb = files["bomb"].read_bytes()
    assert len(bomb) < 200_000
    assert int.from_bytes(bomb[16:20], "big") == int.from_bytes(bomb[20:24], "big") == 30_000
    with pytest.raises(OSError, match="truncated"):
        Image.open(files["truncated_file"]).load()
    with pytest.raises((OSError, SyntaxError)):
        Image.open(files["corrupt"]).load()


def test_benchmark_and_queries(site: Path):
    benchmark = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (site / "benchmark").glob("*.jpg")}
    assert len(benchmark) == num_benchmark(200) == 24
    leaks = [site / file_of(row["line"], row["kind"]) for row in rows(site) if row["kind"] == "benchmark_equal"]
    assert any(hashlib.sha256(path.read_bytes()).hexdigest() in benchmark for path in leaks)
    for query_set in ("as_is", "sample", "cluster"):
        classes = [path.name for path in (site / "queries" / query_set).iterdir()]
        assert len(classes) == 6
        assert len(list((site / "queries" / query_set).rglob("*.jpg"))) == 18


def test_face_boxes_lie_inside(site: Path):
    boxed = [row for row in rows(site) if row["face_box"] is not None]
    assert [row["kind"] for row in boxed] == ["face"] * counts(200)["face"]
    for row in boxed:
        width, height = Image.open(site / file_of(row["line"], "face")).size
        box = row["face_box"]
        assert box["x_px"] >= 0 <= box["y_px"]
        assert box["x_px"] + box["w_px"] <= width
        assert box["y_px"] + box["h_px"] <= height
        assert 23 < box["h_px"] < 161


def test_tiles_never_overlap_and_leave_the_face_out():
    installed = photos.installed_photos()
    tiles = photos.cut_tiles(installed, 1200, np.random.default_rng(0))
    for name, pixels in installed.items():
        used = np.zeros(pixels.shape[:2], int)
        for tile in tiles[name]:
            used[tile.y_px : tile.y_px + tile.side_px, tile.x_px : tile.x_px + tile.side_px] += 1
        assert used.max(initial=0) <= 1
        if name == "astronaut":
            x, y, w, h = photos.FACE_PX
            assert used[y : y + h, x : x + w].sum() == 0


def test_clashes_names_the_later_one():
    hashes = np.array([0, 1, 0xFFFF, 0xFFFFFFFF0000, 0], np.uint64)
    assert clashes(hashes).tolist() == [False, True, False, False, True]


def write_pictures(folder: Path, num: int, side_px: int = 800) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(5)
    for n in range(num):
        small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((side_px, side_px)).save(stream, "JPEG")
        (folder / f"photo{n:03d}.jpg").write_bytes(stream.getvalue())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


def test_given_pictures_are_cut_apart_when_they_are_few(tmp_path: Path):
    given = str(write_pictures(tmp_path / "given", 20))
    crops = photos.given_crops([given], 70)
    assert 70 <= len(crops) <= 80
    for one in crops:
        for other in crops:
            if one is not other and one.file == other.file:
                (l0, t0, r0, b0), (l1, t1, r1, b1) = one.box, other.box
                assert r0 <= l1 or r1 <= l0 or b0 <= t1 or b1 <= t0
    assert len(photos.given_crops([given], 15)) == 20  # whole ones suffice


def test_pieces_that_look_alike_are_used_once(tmp_path: Path):
    wall = np.tile(photos.installed_photos()["coins"][:100, :100], (8, 8, 1))
    Image.fromarray(wall).save(tmp_path / "wall.png")
    crops = photos.given_crops([str(tmp_path)], 4)
    assert (len(crops), len(photos.pieces_apart(crops))) == (4, 1)
    assert len(photos.pieces_apart(crops[:1])) == 1


def test_site_of_given_pictures_is_smaller_when_they_do_not_suffice(tmp_path: Path):
    given = str(write_pictures(tmp_path / "given", 200, side_px=240))
    folder = build(SampleWebConfig(path=str(tmp_path / "site"), urls=400, photos=[given], workers=1))
    info = json.loads((folder / "sample_web.json").read_text())
    assert 200 <= info["num_urls"] < 400
    assert num_pictures(info["num_urls"]) == info["num_pictures"] <= 200
    assert "smaller than asked" in info["note"]
    assert len(rows(folder)) == info["num_urls"]


def test_errors_say_what_to_do(tmp_path: Path):
    missing = SampleWebConfig(path=str(tmp_path / "site"), photos=[str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"sample_web.photos: .*nowhere does not exist; give folders or tars"):
        build(missing)
    few = SampleWebConfig(path=str(tmp_path / "site"), photos=[str(write_pictures(tmp_path / "few", 1))], workers=1)
    with pytest.raises(ConfigError, match=r"usable pictures .* are needed for the smallest site; name more"):
        build(few)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else than a sample web; name an empty folder"):
        build(SampleWebConfig(path=str(tmp_path / "site"), urls=200))
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["thesis.txt"]
