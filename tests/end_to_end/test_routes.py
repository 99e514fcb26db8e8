"""Every kind of source, in a folder and in a bucket: the same pictures by each have the same bytes, and reach tars."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from curation.store import LocalStore
from pipelines.cli import main
from pipelines.results import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PER_ROUTE = 2


class Picture(NamedTuple):
    url: str
    data: bytes
    sha256: str


@pytest.fixture(scope="module")
def pictures(undisturbed) -> list[Picture]:
    """Pictures of the small web that a run took as they are, so that none is a copy of another."""
    images = pd.read_parquet(undisturbed / "pool" / "images").set_index("image_id")
    manifest = pd.read_parquet(undisturbed / "run" / "manifest")
    found = []
    for row in manifest[(manifest.source == "web") & ~manifest.blurred].drop_duplicates("sha256").to_dict("records"):
        image = images.loc[row["image_id"]]
        with (undisturbed / "pool" / image.object).open("rb") as file:
            file.seek(int(image.offset))
            data = file.read(int(image.num_bytes))
        if image.final_url == row["url"]:
            found.append(Picture(row["url"], data, row["sha256"]))
    return sorted(found)


# Routes: each writes pictures below a folder, and says what a recipe calls them there


def packed(suffix: str, data: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def txt(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    (folder / "urls.txt").write_text("".join(f"{picture.url}\n" for picture in pictures))
    return {"kind": "list", "location": "urls.txt"}


def csv_gz(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    text = "alt_text,link\n" + "".join(f'"a, b",{picture.url}\n' for picture in pictures)
    (folder / "urls.csv.gz").write_bytes(packed(".gz", text.encode()))
    return {"kind": "list", "location": "urls.csv.gz", "url_column": "link"}


def tsv(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    (folder / "urls.tsv").write_text("url\n" + "".join(f"{picture.url}\n" for picture in pictures))
    return {"kind": "list", "location": "*.tsv"}


def json_array(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    (folder / "urls.json").write_text(json.dumps([pictures[0].url, *({"url": p.url} for p in pictures[1:])], indent=1))
    return {"kind": "list", "location": "urls.json"}


def jsonl_zst(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    data = b"".join(packed(".zst", json.dumps({"url": picture.url}).encode() + b"\n") for picture in pictures)
    (folder / "urls.jsonl.zst").write_bytes(data)
    return {"kind": "list", "location": "urls.jsonl.zst"}


def parquet(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    pq.write_table(pa.table({"url": [picture.url for picture in pictures]}), folder / "urls.parquet")
    return {"kind": "list", "location": "urls.parquet"}


def folder_of_lists(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    (folder / "deep").mkdir()
    txt(folder / "deep", pictures[1:])
    csv_gz(folder, pictures[:1])
    return {"kind": "list", "location": "", "url_column": "link"}


def pages(pictures: list[Picture]) -> list[tuple[str, bytes]]:
    half = len(pictures) // 2
    return [
        ("http://pages.test/1", "".join(f"<img src='{p.url}' alt='a picture'>" for p in pictures[:half]).encode()),
        (
            "http://pages.test/2",
            "".join(f"<meta property=og:image content='{p.url}'>" for p in pictures[half:]).encode(),
        ),
    ]


def warc(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    with (folder / "x.warc.gz").open("wb") as file:
        writer = WARCWriter(file)
        for url, html in pages(pictures):
            http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
            writer.write_record(writer.create_warc_record(url, "response", io.BytesIO(html), http_headers=http))
    return {"kind": "archive", "location": "x.warc.gz"}


def arc(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    data = b""
    for url, html in pages(pictures):
        block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html
        data += f"{url} 127.0.0.1 20260101000000 text/html {len(block)}\n".encode() + block + b"\n"
    (folder / "x.arc").write_bytes(data)
    return {"kind": "archive", "location": ""}


def wat(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    links = [{"path": "IMG@/src", "url": picture.url, "alt": "a picture"} for picture in pictures]
    http = {"HTTP-Response-Metadata": {"HTML-Metadata": {"Links": links}}}
    page = {"WARC-Header-Metadata": {"WARC-Target-URI": "http://pages.test/"}, "Payload-Metadata": http}
    with (folder / "x.warc.wat.gz").open("wb") as file:
        writer = WARCWriter(file)
        data = io.BytesIO(json.dumps({"Envelope": page}).encode())
        writer.write_record(
            writer.create_warc_record("http://pages.test/", "metadata", data, warc_content_type="application/json")
        )
    return {"kind": "archive", "location": "*.wat.gz"}


def folder(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    for number, picture in enumerate(pictures):
        (folder / f"class {number}").mkdir()
        (folder / f"class {number}" / "x.jpg").write_bytes(picture.data)  # what it is called does not matter
    return {"kind": "folder", "location": ""}


def tar(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    for number, picture in enumerate(pictures):
        with tarfile.open(folder / f"{number}.tar", "w") as file:
            note = json.dumps({"url": "http://elsewhere.test/x", "alt_text": "a picture"}).encode()
            for name, data in (("0001.json", note), ("0001.png", picture.data)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return {"kind": "tar", "location": "*.tar"}


def hugging_face(folder: Path, pictures: list[Picture]) -> dict[str, str]:
    (folder / "data").mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, picture in enumerate(pictures):
        image = pa.array([{"bytes": picture.data, "path": "x.jpg"}], kind)
        pq.write_table(pa.table({"photo": image, "label": [number]}), folder / "data" / f"train-{number}.parquet")
    return {"kind": "parquet", "location": ""}


Route = Callable[[Path, list[Picture]], dict[str, str]]
LISTS: tuple[Route, ...] = (txt, csv_gz, tsv, json_array, jsonl_zst, parquet, folder_of_lists, warc, arc, wat)
LOCAL: tuple[Route, ...] = (folder, tar, hugging_face)
IN_A_BUCKET: tuple[Route, ...] = (csv_gz, parquet, folder_of_lists, warc, *LOCAL)


def recipe_of(sources: dict[str, dict[str, str]]) -> list[str]:
    """The smoke recipe with other sources, all of which it takes."""
    queries = {"all": {"mode": "balanced", "total": 1000}}
    return [f"sources={json.dumps(sources)}", f"queries={json.dumps(queries)}", "benchmarks={}", "shard_rows=100"]


def write_all(root: Path, in_a_bucket: Any, take: Callable[[str], list[Picture]]) -> dict[str, dict[str, str]]:
    """Sources of all routes, those in a bucket under ``s3_NAME``."""
    sources = {}
    for place, routes in (("local", (*LISTS, *LOCAL)), ("s3", IN_A_BUCKET)):
        for route in routes:
            name = route.__name__ if place == "local" else f"s3_{route.__name__}"
            (root / place / name).mkdir(parents=True)
            sources[name] = route(root / place / name, take(name))
    bucket = in_a_bucket(LocalStore(str(root / "s3"))).location
    for name, source in sources.items():
        base = f"{bucket}/{name}" if name.startswith("s3_") else f"{root}/local/{name}"
        source["location"] = f"{base}/{source['location']}"
    return sources


def fetched(folder: Path) -> pd.DataFrame:
    """Lines of a run's sources with what was fetched for each."""
    urls = pd.concat(pd.read_parquet(path) for path in sorted((folder / "pool" / "urls").glob("*.parquet")))
    images = pd.concat(pd.read_parquet(path) for path in sorted((folder / "pool" / "images").glob("*.parquet")))
    return urls.merge(images, on="image_id", how="left")


def test_the_same_pictures_by_each_route_have_the_same_bytes(lab, pictures, tmp_path, in_a_bucket):
    same = pictures[:4]

    def take(name: str) -> list[Picture]:  # the site looks at the path only; equal addresses would be fetched once
        return [picture._replace(url=f"{picture.url}?by={name}") for picture in same]

    sources = write_all(tmp_path, in_a_bucket, take)
    lab.curate(tmp_path, *recipe_of(sources), until="fetched")
    rows = fetched(tmp_path)
    assert len(sources) == 20
    assert rows.error.isna().all()
    assert rows.ok.all(), rows[~rows.ok.astype(bool)][["source", "url", "location", "reason"]]
    for name, of_source in rows.groupby("source"):
        assert sorted(of_source.sha256) == sorted(picture.sha256 for picture in same), name
    assert set(rows.source) == set(sources)
    assert rows.file.notna().all()
    of_warc = rows[rows.source == "warc"]
    assert set(of_warc.page_url) == {"http://pages.test/1", "http://pages.test/2"}
    assert set(of_warc.alt_text.dropna()) == {"a picture"}
    assert set(rows[rows.source == "s3_tar"].url) == {"http://elsewhere.test/x"}
    before = lab.digests(tmp_path)
    assert lab.curate(tmp_path, *recipe_of(sources), until="fetched").summary.num_jobs == 0
    assert lab.digests(tmp_path) == before


def test_pictures_of_every_route_reach_tars(lab, pictures, tmp_path, in_a_bucket, capsys):
    left = list(pictures)

    def take(name: str) -> list[Picture]:
        return [left.pop() for _ in range(PER_ROUTE)]

    sources = write_all(tmp_path, in_a_bucket, take)
    taken = {picture.sha256 for picture in pictures} - {picture.sha256 for picture in left}
    # None is a copy; a descriptor that was fitted to so few pictures may take one for it.
    lab.curate(tmp_path, *recipe_of(sources), "duplicates.threshold=0.99")
    manifest = pd.read_parquet(tmp_path / "run" / "manifest")
    assert set(manifest.source) == set(sources)
    assert set(manifest.sha256) == taken
    assert len(manifest) == len(sources) * PER_ROUTE
    assert verify_run(f"{tmp_path}/run") == ([], len(manifest))
    capsys.readouterr()
    of_warc = manifest[manifest.source == "warc"].image_id.max()
    assert main(["explain", str(of_warc), "--run", f"{tmp_path}/run"]) == 0
    assert "x.warc.gz, line 2" in capsys.readouterr().out
