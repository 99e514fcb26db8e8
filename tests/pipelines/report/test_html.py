import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipelines.report.html import write_report

EMPTY = {"meta", "img", "br", "rect", "link"}


class Balance(HTMLParser):
    """Raises when a tag is closed that is not the open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag


def written(run: Any, path: Path) -> str:
    write_report(run.connect(), path, run.store("pool").read_range)
    return path.read_text(encoding="utf-8")


def test_page_is_whole_and_needs_nothing_else(small_run: Any, tmp_path: Path):
    text = written(small_run, tmp_path / "report.html")
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    for word in (
        "6 pictures from 12 lines",
        "blocked_host",
        "near_duplicate",
        "h0.test",
        "dogs",
        "flowers",
        "Benchmarks",
        "Two pictures are copies from 0.6 on. Pairs: 1;",
        "in use: 0.6",
        "Of the search: 75.00% of the pictures with a cosine from 0.60 on to 5 sampled pictures found (3 of 4 pairs; "
        "at least 40.00% with",
    ):
        assert word in text
    assert len(re.findall(r'src="data:image/jpeg;base64,', text)) >= 6 + 4  # the set, and what was dropped


def test_the_same_run_gives_the_same_page(small_run: Any, tmp_path: Path):
    assert written(small_run, tmp_path / "a.html") == written(small_run, tmp_path / "b.html")


def test_text_of_strangers_is_escaped(small_run: Any, tmp_path: Path):
    small_run.change("urls", 3_000_000, 0, host='<b>"&', url="http://x/<script>alert(1)</script>")
    text = written(small_run, tmp_path / "report.html")
    assert "&lt;b&gt;" in text
    assert "<script" not in text


def test_a_run_that_has_just_begun_has_a_page(small_run: Any, tmp_path: Path):
    for path in small_run.run.rglob("*.parquet"):
        path.unlink()
    assert "Nothing is judged yet" in written(small_run, tmp_path / "report.html")
