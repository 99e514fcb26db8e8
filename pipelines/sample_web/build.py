"""Build the folder of a sample web: pictures, list of addresses, truth, query sets, benchmark, the server's answers.

What lies in the folder: ``urls.csv`` (url, page_url, alt_text), ``truth.parquet``, ``blocked_hosts.txt``,
``queries/SET/CLASS/*.jpg``, ``benchmark/*.jpg``, ``pictures/`` (what the server sends), ``site.json`` (how it answers)
and ``sample_web.json`` (digest and counts; its presence says that the site is whole).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.sample_web import bodies, photos
from pipelines.sample_web.compose import compose
from pipelines.sample_web.config import SampleWebConfig
from pipelines.sample_web.photos import Crop, Pixels, Tile
from pipelines.sample_web.plant import (
    QUERIES_PER_SET,
    QUERY_SETS,
    Line,
    Plan,
    num_benchmark,
    num_pictures,
    plan_site,
)
from pipelines.sample_web.truth import KEPT, KIND_OF, TRUTH_SCHEMA, counts
from training.config import ConfigError

INFO = "sample_web.json"
# No two base pictures may be nearer than this. Two bits more than the promise of 10, for what other formats change.
MIN_DISTANCE_BITS = 13
_SCENES_PER_SET = 6
_MAX_ROUNDS = 30


class Job(NamedTuple):
    """One base picture to draw, and the files to make from it."""

    folder: str
    seed: int
    number: int
    attempt: int
    source: Tile | Crop
    outputs: tuple[tuple[str, str], ...]  # (path inside the folder, how)


class Made(NamedTuple):
    """What is known of a picture once it is drawn."""

    phash: int
    face_box: tuple[float, ...] | None


def build(config: SampleWebConfig, say: Callable[[str], None] | None = None) -> Path:
    """Make the site in ``config.path`` unless it is there already; the folder.

    ``say`` hears what is made, in plain words.

    Raises:
        ConfigError: photos are missing or too few, or the folder holds something else.
    """
    target = Path(config.path).absolute()
    digest = config.digest()
    if (target / INFO).exists():
        if json.loads((target / INFO).read_text())["digest"] == digest:
            return target
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"sample_web.path: {target} holds something else than a sample web; name an empty folder")
    if say is not None:
        say(f"building the sample web of {config.urls:,} addresses in {target}")
    beside = target.with_name(f".{target.name}.{os.getpid()}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _build_in(beside, config, digest)
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            shutil.rmtree(old)
        beside.rename(target)
        note = json.loads((target / INFO).read_text())["note"]
        if say is not None and note:
            say(f"the sample web is {note}")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _build_in(folder: Path, config: SampleWebConfig, digest: str) -> None:
    workers = config.workers or os.cpu_count() or 1
    if workers == 1 or config.urls < 500:  # starting processes costs more than a small site
        _prepare_worker()
        _write_site(folder, config, digest, run_all=lambda f, jobs: [f(job) for job in jobs])
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare_worker) as pool:
        _write_site(folder, config, digest, run_all=lambda f, jobs: list(pool.map(f, jobs, chunksize=16)))


RunAll = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]


def _prepare_worker() -> None:
    import cv2

    cv2.setNumThreads(1)


def _write_site(folder: Path, config: SampleWebConfig, digest: str, *, run_all: RunAll) -> None:
    rng = np.random.default_rng([config.seed, 0])
    if config.photos:
        sources: list[Tile | Crop] = _distinct_crops(config, run_all)
        num_urls = config.urls
        while num_pictures(num_urls) > len(sources):
            num_urls -= 1
            if num_urls < 200:
                raise ConfigError(
                    f"sample_web.photos: {len(sources)} usable pictures (at least 160 px, distinct), "
                    f"{num_pictures(200)} are needed for the smallest site; name more folders or tars"
                )
        sources = [sources[i] for i in rng.permutation(len(sources))][: num_pictures(num_urls)]
    else:
        num_urls = config.urls
        sources = _tile_sources(num_pictures(num_urls), num_benchmark(num_urls), rng)
    plan = plan_site(num_urls, config.num_hosts, rng)
    _add_queries(plan, [source.scene for source in sources], num_benchmark(num_urls))
    made = _draw(folder, config.seed, plan, sources=sources, run_all=run_all)
    for n, (path, how) in enumerate(plan.bad_files):
        _write(folder / path, bodies.bad_file(how, np.random.default_rng([config.seed, 2, n])))
    _write_lists(folder, plan, scenes=[source.scene for source in sources], made=made)
    info = {
        "digest": digest,
        "num_urls": num_urls,
        "asked_urls": config.urls,
        "num_hosts": config.num_hosts,
        "num_pictures": len(sources),
        "num_scenes": len({source.scene for source in sources}),
        "kinds": counts(num_urls),
        "note": "" if num_urls == config.urls else f"smaller than asked: {len(sources)} distinct pictures were given",
    }
    (folder / INFO).write_text(json.dumps(info, indent=1) + "\n")


# Which picture is made from what.


def _tile_sources(num_needed: int, num_references: int, rng: np.random.Generator) -> list[Tile | Crop]:
    """A tile of its own for every picture: the benchmark's, the query sets' (a few scenes each), the list's."""
    tiles = photos.cut_tiles(photos.installed_photos(), num_needed, rng)
    per_scene = QUERIES_PER_SET // _SCENES_PER_SET
    scenes = [name for name in sorted(tiles) if len(tiles[name]) >= 2 * per_scene]
    scenes = [scenes[i] for i in rng.permutation(len(scenes))]
    queries = []
    for n in range(len(QUERY_SETS) * _SCENES_PER_SET):
        scene = scenes[n % len(scenes)]
        queries += [tiles[scene].pop() for _ in range(min(per_scene, len(tiles[scene])))]
    rest = [tile for name in sorted(tiles) for tile in tiles[name]]
    rest = [rest[i] for i in rng.permutation(len(rest))]
    return [*rest[:num_references], *queries, *rest[num_references : num_needed - len(queries)]]


def _distinct_crops(config: SampleWebConfig, run_all: RunAll) -> list[Tile | Crop]:
    """Windows of the given pictures that show something, none like an earlier one to pHash."""
    needed = num_pictures(config.urls)
    crops = photos.given_crops(config.photos, needed)
    distinct = _distinct_of(crops, run_all) if all(crop.box == photos.WHOLE for crop in crops) else []
    if len(distinct) < needed:  # pieces have to be cut, and about half of small pieces look alike or show nothing
        distinct = _distinct_of(photos.given_crops(config.photos, 2 * needed), run_all)
    return distinct


def _distinct_of(crops: list[Crop], run_all: RunAll) -> list[Tile | Crop]:
    by_picture: dict[tuple[str, int], list[Crop]] = {}
    for crop in crops:
        by_picture.setdefault((crop.file, crop.offset), []).append(crop)
    showing = [pair for pairs in run_all(_hashes_of_pieces, by_picture.values()) for pair in pairs]
    clash = clashes(np.array([found for _, found in showing], np.uint64))
    return [crop for (crop, _), double in zip(showing, clash, strict=True) if not double]


def _hashes_of_pieces(crops: list[Crop]) -> list[tuple[Crop, int]]:
    return [(crop, phash_of(pixels)) for crop, pixels in photos.pieces_apart(crops)]


def _add_queries(plan: Plan, scenes: list[str], first: int) -> None:
    for place, query_set in enumerate(QUERY_SETS):
        for n in range(QUERIES_PER_SET):
            number = first + place * QUERIES_PER_SET + n
            plan.pictures[number].outputs.append((f"queries/{query_set}/{scenes[number]}/{number:05d}.jpg", "base"))


# Drawing.


def phash_of(pixels: Pixels) -> int:
    """imagehash.phash of a picture, most significant bit first."""
    import imagehash
    from PIL import Image

    return int(str(imagehash.phash(Image.fromarray(pixels))), 16)


def clashes(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of N hashes lie within ``MIN_DISTANCE_BITS`` - 1 of an earlier one that does not itself, bool [N]."""
    clash = np.zeros(len(hashes), bool)
    for n in range(1, len(hashes)):
        distance = np.bitwise_count(hashes[:n][~clash[:n]] ^ hashes[n])
        clash[n] = bool((distance < MIN_DISTANCE_BITS).any())
    return clash


def _draw(folder: Path, seed: int, plan: Plan, *, sources: list[Tile | Crop], run_all: RunAll) -> list[Made]:
    """Draw every picture with the files made from it; one that looks like an earlier one is drawn again otherwise."""
    jobs = [
        Job(str(folder), seed, picture.number, 0, source, tuple(picture.outputs))
        for picture, source in zip(plan.pictures, sources, strict=True)
    ]
    made: list[Made] = run_all(draw_one, jobs)
    for _ in range(_MAX_ROUNDS):
        again = np.flatnonzero(clashes(np.array([one.phash for one in made], np.uint64)))
        if len(again) == 0:
            return made
        for n in again:
            jobs[n] = jobs[n]._replace(attempt=jobs[n].attempt + 1)
        for n, one in zip(again, run_all(draw_one, [jobs[n] for n in again]), strict=True):
            made[n] = one
    raise ConfigError(
        f"sample_web.seed: {seed} gives pictures that look alike, {_MAX_ROUNDS} times over; try another seed"
    )


def draw_one(job: Job) -> Made:
    """Draw one picture and write its files."""
    rng = np.random.default_rng([job.seed, 1, job.number, job.attempt])
    source = job.source
    if isinstance(source, Tile):
        side, photo = source.side_px, photos.installed_photos()[source.scene]
        pixels = compose(photo[source.y_px : source.y_px + side, source.x_px : source.x_px + side], rng)
    else:
        pixels = photos.read_crop(source)
    face_box = None
    if any(how == "face" for _, how in job.outputs):
        face_px = bodies.FACE_SIZES_PX[job.number % len(bodies.FACE_SIZES_PX)]
        pixels, face_box = bodies.with_face(pixels, face_px, rng)
    for path, how in job.outputs:
        _write(Path(job.folder) / path, bodies.encode(how, pixels, rng))
    return Made(phash_of(pixels), face_box)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# Lists.


def _write_lists(folder: Path, plan: Plan, *, scenes: list[str], made: list[Made]) -> None:
    with (folder / "urls.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["url", "page_url", "alt_text"])
        writer.writerows([line.url, line.page_url, line.alt_text] for line in plan.lines)
    truth = [_truth_row(n, line, scenes, made) for n, line in enumerate(plan.lines)]
    pq.write_table(pa.Table.from_pylist(truth, schema=TRUTH_SCHEMA), folder / "truth.parquet")
    (folder / "blocked_hosts.txt").write_text("\n".join(plan.blocked_hosts) + "\n")
    for name, host in plan.hosts.items():
        host["page"] = [
            [line.url, line.alt_text] for line in plan.lines if line.page_url == f"http://{name}/" and line.url
        ]
    (folder / "site.json").write_text(json.dumps(plan.hosts, sort_keys=True))


def _truth_row(number: int, line: Line, scenes: list[str], made: list[Made]) -> dict[str, Any]:
    kind = KIND_OF[line.kind]
    box = made[line.picture].face_box if line.kind == "face" and line.picture is not None else None
    return {
        "line": number,
        "url": line.url.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        "kind": line.kind,
        "end_stage": kind.end_stage,
        "reason": None if kind.end_stage == KEPT else kind.reason,
        "scene": None if line.picture is None else scenes[line.picture],
        "base_line": line.base_line,
        "face_box": None if box is None else dict(zip(("x_px", "y_px", "w_px", "h_px"), box, strict=True)),
    }
