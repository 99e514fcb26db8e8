"""Pictures read out of tars by index, and tars written, against the webdataset library.

    make bench NAME=tars ARGS="--data 'FOLDER/pool_*.tar'"

The samples are real pictures, each with a json of its lineage as the export writes it, repeated under keys of their own
until all tars are full. One process, one thread, no decoding, no fsync on either side; both sides of reading find the
tars in the page cache, which a pass before the first round fills. Sides take turns; a ratio is one of medians of wall
seconds, webdataset's over ours.

Read: all pictures once. Ours goes through them in a global random order, each by the offset that the index has, opened
by the trainer's `Index` and read by its `Rows`; opening the index is counted in every round. It is measured for both
kinds of parts that are tars, `run` (offsets of the manifest) and `tars` (offsets that a scan found before and kept; the
scan is a row of its own), and judged by the slower. webdataset 1.0.2 has no index: a pass is its stream in stored
order, not a random one, and this is what the goal was set against. Streaming reads the jsons too, ours does not.
Two rows more are not judged: its stream with the jsons passed over (`select_files`), and a global random order as it
can have one, by a shuffle buffer that holds everything. Nothing is said about cold disks or buckets, where each single
read costs a seek or a request.

Written: one tar, the same samples as bytes into the same folder, samples a tar as above. Ours hashes what it writes,
webdataset's TarWriter does not. Both tars are read back every round and are equal member by member, name and bytes.

Prints a row a side, writes a JSON, and ends with a line for each: ratio of medians, webdataset / ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from training.config import DataConfig, PartConfig
from training.data.index import Index
from training.data.sources import pictures
from training.data.tars import TarWriter

READ_GOAL, WRITE_GOAL = 5.0, 1.0
PACKAGES = ("numpy", "pyarrow", "webdataset")
Sample = tuple[str, bytes, bytes]  # key, picture, json
Timed = dict[str, dict[str, list[float]]]  # seconds by side, wall and cpu


# Samples


def made_samples(location: str, num: int) -> list[Sample]:
    """Pictures of tars, repeated up to a number, with a lineage each."""
    found = [picture for _, _, picture in pictures(PartConfig(kind="tars", location=location), None)]
    samples = []
    for number in range(num):
        picture = found[number % len(found)]
        lineage = {
            "caption": None,
            "image_id": number,
            "page": f"https://example.org/page/{number % 97}",
            "part": "pool",
            "sha256": hashlib.sha256(picture).hexdigest(),
            "url": f"https://example.org/pictures/{number:09d}.jpg",
        }
        samples.append((f"{number:09d}", picture, json.dumps(lineage).encode()))
    return samples


def write_run(folder: Path, samples: list[Sample], num_tars: int) -> None:
    """What `lvd curate` leaves and the trainer reads: tars, their list, a manifest each."""
    for name in ("tars", "shards", "manifest"):
        (folder / name).mkdir()
    listed = []
    for number in range(num_tars):
        name = f"tars/{number:06d}.tar"
        writer = TarWriter(folder / name)
        rows = []
        for key, picture, lineage in samples[number::num_tars]:
            offset = writer.add(f"{key}.jpg", picture)
            writer.add(f"{key}.json", lineage)
            rows.append({"key": key, "part": "pool", "tar": name, "offset": offset, "size": len(picture)})
        writer.close()
        pq.write_table(pa.Table.from_pylist(rows), folder / f"manifest/part-{number:09d}.parquet")
        told = {"num_samples": len(rows), "num_bytes": writer.num_bytes, "sha256": writer.sha256}
        listed.append({"tar": name} | told)
    pq.write_table(pa.Table.from_pylist(listed), folder / f"shards/part-{0:09d}.parquet")


# Reading


def by_index(part: PartConfig, cache: Path | None, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Keys and pictures of a part in a global random order."""
    index = Index.open(DataConfig(parts={"all": part}), cache=cache)
    (opened,) = index.parts
    rows = [opened.source.rows(shard) for shard in opened.shards]
    order = rng.permutation(opened.num_samples)
    shards = np.searchsorted(opened.starts, order, side="right") - 1
    for shard, row in zip(shards.tolist(), (order - opened.starts[shards]).tolist(), strict=True):
        yield rows[shard].keys[row].rpartition("/")[2], rows[shard].read(row)


def by_stream(paths: list[str], *, jsons: bool = True, buffer: int = 0) -> Iterator[tuple[str, bytes]]:
    """Keys and pictures of webdataset, in stored order or through a shuffle buffer of so many samples."""
    chosen = None if jsons else lambda name: not name.endswith(".json")
    stream = wds.WebDataset(paths, shardshuffle=False, select_files=chosen)
    if buffer:
        stream = stream.shuffle(buffer, initial=buffer)
    for sample in stream:
        yield sample["__key__"], sample["jpg"]


def digest_of(read: Iterable[tuple[str, bytes]]) -> str:
    """Of keys and pictures, whatever their order."""
    lines = sorted(f"{key} {hashlib.sha256(picture).hexdigest()}" for key, picture in read)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# Measurement


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int, check: Callable[[dict[str, Any]], None]) -> Timed:
    """Run the sides one after another, each round from another one on; what they return is checked after each round."""
    spent: Timed = {name: {"wall": [], "cpu": []} for name in sides}
    names = list(sides)
    for turn in range(rounds):
        returned = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            returned[name] = sides[name]()
            spent[name]["wall"].append(time.perf_counter() - wall)
            spent[name]["cpu"].append(time.process_time() - cpu)
        check(returned)
    return spent


def measure_read(folder: Path, samples: list[Sample], rounds: int) -> tuple[Timed, str, float]:
    """All sides of reading: seconds, digest of what each read, seconds of the scan that kind `tars` keeps."""
    paths = sorted(str(path) for path in (folder / "tars").iterdir())
    run, tars = PartConfig(kind="run", location=str(folder)), PartConfig(kind="tars", location=str(folder / "tars"))
    cache = folder / "cache"
    rng = np.random.default_rng(0)
    num = len(samples)
    reads: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
        "webdataset": lambda: by_stream(paths),
        "webdataset, no jsons": lambda: by_stream(paths, jsons=False),
        "webdataset, shuffled": lambda: by_stream(paths, buffer=num),
        "ours, run": lambda: by_index(run, None, rng),
        "ours, tars": lambda: by_index(tars, cache, rng),
    }
    digest = digest_of((key, picture) for key, picture, _ in samples)
    started = time.perf_counter()
    Index.open(DataConfig(parts={"all": tars}), cache=cache)
    scan_s = time.perf_counter() - started
    for name, read in reads.items():
        assert digest_of(read()) == digest, f"{name} read other samples"

    def passed(read: Callable[[], Iterator[tuple[str, bytes]]]) -> tuple[int, int]:
        count = total = 0
        for _, picture in read():
            count += 1
            total += len(picture)
        return count, total

    expected = (num, sum(len(picture) for _, picture, _ in samples))

    def check(returned: dict[str, Any]) -> None:
        assert set(returned.values()) == {expected}, returned

    sides = {name: lambda read=read: passed(read) for name, read in reads.items()}
    return in_turns(sides, rounds, check), digest, scan_s


def measure_write(folder: Path, samples: list[Sample], rounds: int) -> Timed:
    """Both writers: seconds."""
    their_path, our_path = folder / "webdataset.tar", folder / "ours.tar"
    expected = [
        member for key, picture, lineage in samples for member in ((f"{key}.jpg", picture), (f"{key}.json", lineage))
    ]

    def theirs() -> None:
        with wds.TarWriter(str(their_path), encoder=False) as writer:
            for key, picture, lineage in samples:
                writer.write({"__key__": key, "jpg": picture, "json": lineage})

    def ours() -> str:
        writer = TarWriter(our_path)
        for key, picture, lineage in samples:
            writer.add(f"{key}.jpg", picture)
            writer.add(f"{key}.json", lineage)
        writer.close()
        return writer.sha256

    def check(returned: dict[str, Any]) -> None:
        with our_path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == returned["ours"]
        for path in (their_path, our_path):
            with tarfile.open(path) as tar:
                for member, (name, data) in zip(tar, expected, strict=True):
                    read = tar.extractfile(member)
                    assert read is not None
                    assert (member.name, read.read()) == (name, data), f"{path}: {name} was not written as it is"
            path.unlink()  # each round makes a new file

    return in_turns({"webdataset": theirs, "ours": ours}, rounds, check)


def main() -> int:
    shared = os.environ.get("LVD_SHARED_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        default=f"{shared}/pool_*.tar" if shared else None,
        required=not shared,
        help="folder or pattern of tars with photographs; default: pool_*.tar in the folder LVD_SHARED_DATA",
    )
    parser.add_argument("--folder", type=Path, help="where the tars are made; default: for temporary files")
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1000, help="of each tar")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/tars.json"), help="where the numbers go")
    options = parser.parse_args()
    samples = made_samples(options.data, options.tars * options.samples)
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        write_run(folder, samples, options.tars)
        read, digest, scan_s = measure_read(folder, samples, options.rounds)
        of_one_tar = samples[: options.samples]
        written = measure_write(folder, of_one_tar, options.rounds)

    def median(spent: Timed, side: str, clock: str = "wall") -> float:
        return statistics.median(spent[side][clock])

    read_bytes = sum(len(picture) for _, picture, _ in samples)
    write_bytes = sum(len(picture) + len(lineage) for _, picture, lineage in of_one_tar)
    for what, spent, num_bytes in (("read", read, read_bytes), ("written", written, write_bytes)):
        print(f"{what}, {num_bytes / 1e6:.0f} MB; medians of {options.rounds} rounds")
        for side in spent:
            wall, cpu = median(spent, side), median(spent, side, "cpu")
            times = f"webdataset / this {median(spent, 'webdataset') / wall:5.2f}"
            fastest = min(spent[side]["wall"])
            print(f"  {side:<21} {wall:7.3f} s, fastest {fastest:7.3f} s, {cpu:7.3f} CPU s   {times}")
    print(f"  scan of all tars, once {scan_s:6.3f} s, not counted")
    slower = max(("ours, run", "ours, tars"), key=lambda side: median(read, side))
    results = {
        "read": (median(read, "webdataset") / median(read, slower), READ_GOAL),
        "written": (median(written, "webdataset") / median(written, "ours"), WRITE_GOAL),
    }
    report = {
        "read_s": read,
        "written_s": written,
        "scan_s": scan_s,
        "ratios": {name: ratio for name, (ratio, _) in results.items()},
        "goals": {name: goal for name, (_, goal) in results.items()},
        "judged": slower,
        "inputs": {name: getattr(options, name) for name in ("tars", "samples", "rounds")}
        | {"read_bytes": read_bytes, "written_bytes": write_bytes, "digest": digest},
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"numbers in {options.json}")
    for name, (ratio, goal) in results.items():
        print(f"tars {name} ratio {ratio:.2f} goal {goal} {'ok' if ratio >= goal else 'short'}")
    return 0 if all(ratio >= goal for ratio, goal in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
