"""A small run of hand-made tables with real pictures: what reports, checks and the export are tested on.

Sources: a benchmark, a set taken as it is, a set that is sampled for, and twelve lines of web pictures in two shards.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.export.export import Export, ExportConfig
from curation.schema import TABLES, VERDICTS, Part
from curation.stage import Task
from curation.store import LocalStore, read_part, write_part
from pipelines.plan import Ledger
from pipelines.work import Where, WorkerIO
from training.data.tars import TarWriter

BENCH, AS_IS, ASKED, WEB = 0, 1, 2, 3  # source ids
NAMES = {BENCH: ("bench", "benchmark"), AS_IS: ("flowers", "query"), ASKED: ("dogs", "query"), WEB: ("web", "pool")}
# shard -> fate of each row: None where it is kept, else the verdict that drops it and why
FATES: dict[int, list[tuple[str, str] | None]] = {
    0: [None, None],
    1_000_000: [None, None, ("safety", "decode_corrupt")],
    2_000_000: [None, ("fetched", "file_missing")],
    3_000_000: [
        None,
        ("screened", "blocked_host"),
        ("fetched", "http_4xx"),
        ("safety", "too_small"),
        ("near", "near_duplicate"),
        ("duplicates", "copy"),
    ],
    3_000_001: [None, ("leakage", "leak"), ("selection", "not_retrieved"), None, ("screened", "duplicate_url"), None],
}
FIRST, SECOND = 3_000_000_000_000, 3_000_001_000_000  # ids of the first row of each web shard
WITH_FACE = FIRST
REPRESENTATIVES = {FIRST + 4: FIRST, FIRST + 5: SECOND}
AS_PNG = SECOND + 3


def picture(seed: int, kind: str = "jpeg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind.upper())
    return file.getvalue()


@dataclass
class SmallRun:
    """Roots, and ways to write and to rewrite a part."""

    pool: Path
    run: Path

    def store(self, root: str) -> LocalStore:
        return LocalStore(str(self.pool if root == "pool" else self.run))

    def write(self, name: str, index: int, rows: Sequence[dict[str, Any]]) -> None:
        table = TABLES[name]
        self.put(Part(table.root, name, index), pa.Table.from_pylist(list(rows), schema=table.schema))

    def put(self, part: Part, table: pa.Table, **origin: Any) -> Any:
        path = self.pool.parent / "part"
        origin = {"stage": "by hand", "version": 1, "fingerprint": "", "inputs": {}, **origin}
        footer = write_part(table, path, **origin)
        store = self.store(part.root)
        store.replace(part.path, path, store.tag(part.path))
        return footer

    def read(self, name: str, index: int) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        table = TABLES[name]
        rows: list[dict[str, Any]] = pq.read_table(
            (self.pool if table.root == "pool" else self.run) / Part(table.root, name, index).path
        ).to_pylist()
        return rows

    def change(self, name: str, index: int, row: int, **values: Any) -> None:
        rows = self.read(name, index)
        rows[row].update(values)
        self.write(name, index, rows)

    def take_twice(self, *, in_manifest: bool = True) -> None:
        """Make the set a multiset: the set dogs took the first picture of the second web shard for two queries."""
        (sample,) = (row for row in self.read("choices", 3_000_001) if row["image_id"] == SECOND)
        again = {"copy": 1, "query_id": 2_000_000_000_001}
        rows = self.read("choices", 3_000_001)
        self.write("choices", 3_000_001, [rows[0], sample | again, *rows[1:]])
        asked = self.read("neighbours", 2_000_000)
        self.write("neighbours", 2_000_000, [*asked, asked[1] | {"query_id": again["query_id"], "rank": 0}])
        self.change("retrieval", 2_000_000, 0, num_queries=2, num_nominal=8, num_retrieved=5, num_taken=5, shortfall=3)
        self.change("retrieval", 2_000_000, 0, num_collisions=1)
        if in_manifest:
            (told,) = (row for n in (0, 1) for row in self.read("manifest", n) if row["image_id"] == SECOND)
            more = {"key": "000000006", "query_id": again["query_id"]}
            self.write("manifest", 1, [*self.read("manifest", 1), told | more])

    def match_a_test_picture(self) -> None:
        """The first picture of the set flowers is one of the benchmark, and left out."""
        first = 1_000_000_000_000
        match = {"image_id": first, "reference_id": 0, "via_id": first, "similarity": 0.875, "leaks": True}
        self.write("leaks", 1_000_000, [match, *self.read("leaks", 1_000_000)])
        told = {
            "keep": False,
            "reason": "test_match",
            "score": 0.875,
            "threshold": 0.5,
            "reference_id": 0,
            "part": None,
        }
        self.change("selection", 1_000_000, 0, **told)
        self.write("choices", 1_000_000, self.read("choices", 1_000_000)[1:])
        self.change("retrieval", 1_000_000, 0, num_test_matches=1)

    def mean_the_same(self) -> None:
        """The last picture of the second web shard goes for the first, by way of the one between them."""
        rows = {row["image_id"]: row for row in self.read("semantic", 3_000_001)}
        same = {"keep": False, "reason": "semantic_duplicate", "score": 0.9375, "threshold": 0.875}
        same |= {"representative_id": SECOND}
        rows[AS_PNG] |= same | {"nearest_id": SECOND}
        rows[SECOND + 5] |= same | {"nearest_id": AS_PNG}
        self.write("semantic", 3_000_001, list(rows.values()))
        for table in ("selection", "choices"):
            left = [row for row in self.read(table, 3_000_001) if row["image_id"] not in (AS_PNG, SECOND + 5)]
            self.write(table, 3_000_001, left)
        self.write("neighbours", 2_000_000, self.read("neighbours", 2_000_000)[:2])

    def connect(self) -> Any:
        from curation.query import connect

        return connect(self.pool, self.run, {}, set(NAMES))

    def export(self, config: ExportConfig) -> int:
        """Run the export stage, as the runner does; the number of tasks that were not done yet."""
        stage = Export(config)
        ledger = Ledger(
            stores={"pool": self.store("pool"), "run": self.store("run")},
            stages=[stage],
            registered=read_part(self.store("pool"), Part("pool", "sources", 0)),
            source_ids={name: n for n, (name, _) in NAMES.items()},
        )
        where = Where(
            pool=str(self.pool),
            run=str(self.run),
            pool_token="",
            run_token="",
            recipe="",
            roles={n: role for n, (_, role) in NAMES.items()},
        )
        num_done = 0

        def run_all(tasks: Sequence[Task]) -> None:
            nonlocal num_done
            for task in tasks:
                undone = ledger.undone_task(stage, task)
                if undone is None:
                    continue
                num_done += 1
                scratch = self.pool.parent / "scratch"
                scratch.mkdir(exist_ok=True)
                table = task.function(WorkerIO(undone.job, where, stage, scratch), **task.args)
                assert table.schema.equals(TABLES[task.writes.folder].schema)
                origin = {**vars(undone.job.origin)}
                ledger.committed({task.writes: self.put(task.writes, table, **origin)})

        stage.run(ledger, run_all)
        return num_done


def build(folder: Path) -> SmallRun:
    """Pool and run under a folder, all verdicts done, nothing exported."""
    small = SmallRun(pool=folder / "pool", run=folder / "run")
    sources = []
    for source, (name, role) in NAMES.items():
        shards = [shard for shard in FATES if shard // 1_000_000 == source]
        sources.append(
            {"source_id": source, "name": name, "role": role, "kind": "list", "location": f"{folder}/web/{name}.csv",
             "digest": "", "num_rows": sum(len(FATES[s]) for s in shards), "shard_rows": 6, "num_shards": len(shards)}
        )  # fmt: skip
    small.write("sources", 0, sources)
    for shard, fates in FATES.items():
        _write_shard(small, shard, fates)
    neighbours = [("dogs", 0, FIRST), ("dogs", 1, SECOND), ("dogs", 2, AS_PNG), ("dogs", 3, SECOND + 5)]
    small.write(
        "neighbours",
        2_000_000,
        [
            {"query_set": s, "query_id": 2_000_000_000_000, "image_id": i, "rank": r, "similarity": 0.5, "cluster": 1}
            for s, r, i in neighbours
        ],
    )
    told = {"query_set": "dogs", "place": 1, "mode": "sample", "num_queries": 1, "num_nominal": 4, "num_retrieved": 4,
            "num_final_nominal": 4, "num_taken": 4, "num_unique": 4, "num_collisions": 0, "shortfall": 0,
            "num_sampled": 1, "recall": 1.0}  # fmt: skip
    small.write("retrieval", 2_000_000, [told])
    owned = {"query_set": "flowers", "place": 0, "mode": "as_is", "num_queries": 2, "num_final_nominal": 2}
    owned |= {"num_test_matches": 0}
    small.write("retrieval", 1_000_000, [owned])
    leak = {"image_id": SECOND + 1, "reference_id": 1, "via_id": SECOND + 1, "similarity": 0.7, "leaks": True}
    small.write("leaks", 1_000_000, [leak])
    small.write("component_sizes", 0, [{"size": 1, "num_components": 5}, {"size": 2, "num_components": 1}])
    sweep = [(0.55, 2, 1, 3, 2, 3), (0.6, 1, 1, 2, 1, 2), (0.8, 0, 0, 0, 0, 1), (1.0, 0, 0, 0, 0, 1)]
    names = ("threshold", "num_edges", "num_components", "num_pictures", "num_dropped", "largest")
    rows = [dict(zip(names, row, strict=True)) | {"in_use": row[0] == 0.6} for row in sweep]
    small.write("component_sweep", 0, rows)
    searched = {"num_pictures": 7, "num_sampled": 5}
    of_pool = {"kind": "pool", "threshold": 0.6, "num_edges": 4, "num_found": 3, "recall": 0.75, "recall_at_least": 0.4}
    of_benchmark = {"kind": "benchmark", "threshold": 0.45, "num_edges": 0, "num_found": 0}
    small.write("edge_recall", 0, [{**searched, **of_pool}, {**searched, **of_benchmark}])
    small.write("url_duplicates", 0, [{"image_id": SECOND + 4, "first_id": FIRST}])
    state = {
        "recipe": "small", "pool": str(small.pool), "folders": {}, "truth": None, "parts": {},
        "sources": {name: n for n, (name, _) in NAMES.items()},
    }  # fmt: skip
    (small.run / "state.json").write_text(json.dumps(state))
    return small


def _write_shard(small: SmallRun, shard: int, fates: list[tuple[str, str] | None]) -> None:
    name, role = NAMES[shard // 1_000_000]
    ids = [shard * 1_000_000 + n for n in range(len(fates))]
    offset = 6 if shard == 3_000_001 else 0
    small.write(
        "urls",
        shard,
        [
            {"image_id": i, "source": name, "line": n + offset, "url": f"http://h{n % 2}.test/{name}/{i}.jpg",
             "host": f"h{n % 2}.test", "alt_text": f"grün {n}", "label": "rose" if name == "flowers" else None}
            for n, i in enumerate(ids)
        ],
    )  # fmt: skip
    bodies = {i: picture(i % 99_991, "png" if i == AS_PNG else "jpeg") for i in ids}
    sha256 = {i: hashlib.sha256(body).hexdigest() for i, body in bodies.items()}
    order = VERDICTS if role == "pool" else VERDICTS[:3]
    left = dict(zip(ids, fates, strict=True))
    survivors = {}
    for verdict in order:
        survivors[verdict] = dict(left)
        left = _write_verdict(small, verdict, shard, left, sha256)
    if role == "query":
        _write_verdict(small, "selection", shard, left, sha256)
        mode = "as_is" if name == "flowers" else "sample"
        small.write(
            "queries", shard, [{"query_id": i, "query_set": name, "mode": mode, "k": 4, "cluster": 1} for i in left]
        )
    clustered = list(survivors["selection"] if role == "pool" else left)
    if role != "benchmark":
        small.write("clusters", shard, [{"image_id": i, "cluster": i % 3, "similarity": 0.75} for i in clustered])
    _write_facts(small, shard, list(survivors["fetched"]), list(survivors["safety"]), bodies, fates)


def _write_verdict(
    small: SmallRun, verdict: str, shard: int, left: dict[int, Any], sha256: dict[int, str]
) -> dict[int, Any]:
    rows = []
    query_set, role = NAMES[shard // 1_000_000]
    for i, fate in left.items():
        reason = fate[1] if fate is not None and fate[0] == verdict else None
        if verdict == "selection" and query_set == "dogs":
            reason = "not_retrieved"
        row = {"image_id": i, "sha256": sha256[i], "keep": reason is None, "reason": reason}
        row |= {"score": 0.7, "threshold": 0.6} if reason in ("copy", "leak") else {}
        row |= {"representative_id": REPRESENTATIVES.get(i, i), "component_id": i}
        if verdict == "near" and reason is None:
            row["representative_id"] = i
        row |= {"reference_id": 1, "benchmark": "bench"} if reason == "leak" else {}
        if verdict == "selection":
            row |= {"cluster": i % 3, "part": (query_set if role == "query" else "dogs") if reason is None else None}
            row |= {"query_id": 2_000_000_000_000, "similarity": 0.5} if role == "pool" and reason is None else {}
        rows.append({name: row.get(name) for name in TABLES[verdict].schema.names})
    small.write(verdict, shard, rows)
    if verdict == "selection":
        names = set(TABLES["choices"].schema.names) & set(rows[0])
        small.write("choices", shard, [{"copy": 0} | {n: row[n] for n in names} for row in rows if row["keep"]])
    return {i: fate for i, fate in left.items() if fate is None or fate[0] != verdict}


def _write_facts(
    small: SmallRun, shard: int, fetched: list[int], looked: list[int], bodies: dict[int, bytes], fates: list[Any]
) -> None:
    tars = {name: _tar(small, f"{name}/{shard:09d}.tar") for name in ("bytes", "small", "blurred")}
    images, hashes, detections = [], [], []
    for i in fetched:
        fate = fates[i % 1_000_000]
        failed = fate[1] if fate is not None and fate[0] == "fetched" else None
        if failed:
            images.append({"image_id": i, "ok": False, "reason": failed, "http_status": 404})
            continue
        body = bodies[i]
        images.append(
            {"image_id": i, "ok": True, "http_status": 200, "format": "png" if i == AS_PNG else "jpeg",
             "sha256": hashlib.sha256(body).hexdigest(), "num_bytes": len(body),
             "object": f"bytes/{shard:09d}.tar", "offset": tars["bytes"].add(f"{i}", body)}
        )  # fmt: skip
    for i in looked:
        sha256 = hashlib.sha256(bodies[i]).hexdigest()
        hashes.append({"image_id": i, "sha256": sha256, "ok": True, "width_px": 64, "height_px": 48, "phash": i})
        seen = {"image_id": i, "sha256": sha256, "nsfw_score": 0.0, "num_faces": int(i == WITH_FACE)}
        little = picture(i % 99_991 + 200_000)  # no other picture's bytes
        seen |= {"small_object": f"small/{shard:09d}.tar", "small_offset": tars["small"].add(f"{i}", little)}
        seen["small_bytes"] = len(little)
        if i == WITH_FACE:
            blurred = picture(7)
            seen |= {"blurred_object": f"blurred/{shard:09d}.tar", "blurred_offset": tars["blurred"].add("f", blurred)}
            seen["blurred_bytes"] = len(blurred)
        detections.append(seen)
    for tar in tars.values():
        tar.close()
    for name, rows in (("images", images), ("hashes", hashes), ("detections", detections)):
        small.write(name, shard, rows)


def _tar(small: SmallRun, path: str) -> TarWriter:
    place = small.pool / path
    place.parent.mkdir(parents=True, exist_ok=True)
    return TarWriter(place)
