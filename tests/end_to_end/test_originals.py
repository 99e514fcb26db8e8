"""look.purge_originals: no byte of an original with a face is left, the run is the same, and what that costs later."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipelines.results import opened, verify_run
from training.config import ConfigError
from training.data.pixels import decode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PURGE = "look.purge_originals=true"
EXPORTED = ("export_rows", "export_plan", "manifest", "tar_digests", "shards", "tars")


def with_faces(folder: Path) -> pd.DataFrame:
    (looked,) = (folder / "pool" / "detections").iterdir()
    found = pd.read_parquet(looked).query("num_faces > 0")
    found = found.merge(pd.read_parquet(folder / "pool" / "images").query("ok"), on="image_id")
    return found.astype({"offset": "Int64", "num_bytes": int})


def with_more(folder: Path) -> pd.DataFrame:
    """Pictures without a face whose files hold more than was seen: animations and alpha, of the sample web."""
    (looked,) = (folder / "pool" / "detections").iterdir()
    found = pd.read_parquet(looked).query("num_faces == 0 and blurred_object.notna()")
    found = found.merge(pd.read_parquet(folder / "pool" / "images"), on="image_id")
    return found.astype({"offset": "Int64", "num_bytes": int})


def assert_the_same_but_for_these(folder: Path, other: Path, lab, image_ids: set[int]) -> None:
    """Nothing differs but which bytes of these pictures lie in tars, and where bytes lie behind them."""
    found, expected = lab.contents(folder), lab.contents(other)
    verdicts = [{k: v for k, v in all_of.items() if k.split("/")[0] not in EXPORTED} for all_of in (found, expected)]
    assert len(verdicts[0]) > 100
    assert verdicts[0] == verdicts[1]
    purged, kept = (pd.read_parquet(root / "run" / "manifest").set_index("key") for root in (folder, other))
    assert purged.image_id.equals(kept.image_id)
    theirs = kept.image_id.isin(image_ids)
    assert theirs.any()
    assert purged[theirs].blurred.all()
    assert not kept[theirs].blurred.any()
    assert (purged[theirs].ext == "jpg").all()
    moved = ["tar", "offset"]
    pd.testing.assert_frame_equal(purged[~theirs].drop(columns=moved), kept[~theirs].drop(columns=moved))
    changed = [*moved, "blurred", "size", "ext"]
    pd.testing.assert_frame_equal(purged[theirs].drop(columns=changed), kept[theirs].drop(columns=changed))


def holding(folder: Path, needles: list[bytes]) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]


def test_no_face_is_left_and_the_run_is_the_same(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    faces = with_faces(folder)
    assert len(faces) >= 4
    more = with_more(folder)
    originals = {}
    for row in [*faces.to_dict("records"), *more.to_dict("records")]:
        tar = (folder / "pool" / row["object"]).read_bytes()
        originals[row["image_id"]] = tar[row["offset"] : row["offset"] + row["num_bytes"]]
    assert holding(folder, list(originals.values()))

    (folder / "run" / "report.html").write_text("a page with faces, of weaker settings")
    lab.curate(folder, PURGE)
    assert holding(folder, list(originals.values())) == []
    assert not (folder / "run" / "report.html").exists()
    assert_the_same_but_for_these(folder, undisturbed, lab, set(more.image_id))
    assert verify_run(f"{folder}/run")[0] == []
    (folder / "run" / "report.html").write_text("a page of today")
    assert lab.curate(folder, PURGE).summary.num_jobs == 0
    assert (folder / "run" / "report.html").exists()
    assert lab.curate(folder).summary.num_jobs == 0  # and the recipe without it goes on from there

    # In every picture that is still stored the found faces are blurred, the intermediates among them.
    places = {row["image_id"]: row["faces"] for row in faces.to_dict("records")}
    num_seen = 0
    for tar in sorted((folder / "pool").rglob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                image_id = int(Path(member.name).stem)
                if image_id not in places:
                    continue
                num_seen += 1
                assert tar.parent.name != "bytes"
                now = decode(members.extractfile(member).read()).rgb
                was = decode(originals[image_id]).rgb
                for box in places[image_id]:
                    assert sharpness(now, box, was.shape[0]) < 0.5 * sharpness(was, box, was.shape[0])
    assert num_seen == 2 * len(faces)

    # Looking again would throw away what cannot be made again.
    with pytest.raises(ConfigError, match="--redo look: originals were purged from this pool"):
        lab.curate(folder, redo=["look"])

    # A look with other settings cannot see them any more, and says so.
    lab.curate(folder, PURGE, "look.face_thresholds=[0.9, 0.9, 0.9, 0.9]", until="safety")
    with opened(f"{folder}/run") as database:
        rows = database.connection.execute(
            "SELECT DISTINCT image_id FROM safety WHERE reason = 'original_purged' AND image_id IN (SELECT unnest(?))",
            [sorted(places)],
        ).fetchall()
    assert {row[0] for row in rows} == set(places)


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def test_a_face_in_another_frame_or_below_alpha_is_not_left_either(lab, tmp_path):
    from skimage import data

    woman = Image.fromarray(data.astronaut()).resize((256, 256))
    coffee, stones = (Image.fromarray(rgb).convert("RGB").resize((256, 256)) for rgb in (data.coffee(), data.gravel()))
    hidden = Image.fromarray(data.rocket()).resize((256, 256)).convert("RGBA")
    hidden.paste(woman.resize((128, 128)))
    hidden.putalpha(Image.fromarray((np.indices((256, 256)).max(0) >= 128).astype(np.uint8) * 255))
    files = {
        "two_frames.gif": saved(coffee, "GIF", save_all=True, append_images=[woman], duration=100),
        "hidden.png": saved(hidden, "PNG"),
        "opaque.png": saved(stones.convert("RGBA"), "PNG"),
        "plain.jpg": saved(Image.fromarray(data.chelsea()), "JPEG"),
    }
    (tmp_path / "mine").mkdir()
    for name, content in files.items():
        (tmp_path / "mine" / name).write_bytes(content)
    sources = {"mine": {"kind": "folder", "location": str(tmp_path / "mine")}}
    queries = {"all": {"mode": "balanced", "total": 100}}
    takes = [f"sources={json.dumps(sources)}", f"queries={json.dumps(queries)}", "benchmarks={}", "shard_rows=100"]
    parts = {name: content[len(content) // 2 :][:100] for name, content in files.items()}

    def left() -> set[str]:
        roots = (tmp_path / "pool", tmp_path / "run")
        return {name for name, part in parts.items() if any(holding(root, [part]) for root in roots)}

    lab.curate(tmp_path, *takes, "duplicates.threshold=0.99")
    manifest = pd.read_parquet(tmp_path / "run" / "manifest")
    assert len(manifest) == len(files)
    assert left() == set(files)
    lab.curate(tmp_path, *takes, "duplicates.threshold=0.99", PURGE)
    assert left() == {"opaque.png", "plain.jpg"}
    assert verify_run(f"{tmp_path}/run") == ([], len(files))
    by_name = pd.read_parquet(tmp_path / "run" / "manifest").set_index("location")
    assert by_name.blurred.to_dict() == {name: not name.startswith(("opaque", "plain")) for name in files}
    row = by_name.loc["two_frames.gif"]
    tar = (tmp_path / "run" / row.tar).read_bytes()
    seen = decode(tar[row.offset : row.offset + row["size"]])
    assert (seen.format, seen.num_frames, seen.shows_all) == ("jpeg", 1, True)
    assert np.abs(seen.rgb.astype(int) - decode(files["two_frames.gif"]).rgb).mean() < 3


def sharpness(rgb: np.ndarray, box: dict, height_px: int) -> float:
    """Mean difference of neighbours inside a box, in a picture that may be a smaller version."""
    scale = rgb.shape[0] / height_px
    left, top, right, bottom = (
        round(scale * value)
        for value in (box["x_px"], box["y_px"], box["x_px"] + box["w_px"], box["y_px"] + box["h_px"])
    )
    inside = rgb[top:bottom, left:right].astype(float).mean(2)
    return float(np.abs(np.diff(inside, axis=0)).mean() + np.abs(np.diff(inside, axis=1)).mean())


def test_from_the_start_with_the_same_end(lab, undisturbed, tmp_path):
    folder = tmp_path / "fresh"
    lab.curate(folder, PURGE)
    assert_the_same_but_for_these(folder, undisturbed, lab, set(with_more(folder).image_id))
    assert with_faces(folder)["object"].isna().all()
    assert with_more(folder)["object"].isna().all()
    assert verify_run(f"{folder}/run")[0] == []


def test_scratch_of_a_killed_process_goes(tmp_path):
    code = (
        "import os, signal\nfrom pipelines.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'picture').write_bytes(b'face')\n"
        "    print(folder, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    left = Path(process.stdout.strip())
    assert (left / "picture").exists()
    sweep = "from pipelines.scratch import scratch_folder, sweep_scratch\n"
    sweep += "with scratch_folder() as mine:\n    sweep_scratch()\n    print(mine.exists())\n"
    swept = subprocess.run(
        [sys.executable, "-c", sweep], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert swept.stdout == "True\n"
    assert list(tmp_path.iterdir()) == []
