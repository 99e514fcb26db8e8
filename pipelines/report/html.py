"""The page of a run: one file that needs no network and no script.

Funnel, what ended the lines, what the set is made of, copies, hosts, clusters, and pictures: chosen ones, and dropped
ones for each reason beside what they were held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from curation.query import run_sql
from pipelines.report.copies import STYLE as STYLE_OF_COPIES
from pipelines.report.copies import classes_of_sizes, sweep_svg, told_of_search, told_of_threshold
from pipelines.report.funnel import FunnelRow, funnel
from pipelines.report.retrieval import notes, query_sets, told
from pipelines.report.thumbnails import ReadRange, Thumbnail, chosen, dropped

_NUM_PICTURES = 50
_NUM_HOSTS = 20
_NUM_BARS = 160
_CHART_HEIGHT = 120

_STYLE = """
:root { --ink: #1f2328; --soft: #6b7280; --line: #e5e7eb; --paper: #fff; --fill: #3b6ea5; --pale: #d5dfeb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #9ca3af; --line: #30363d; --paper: #16191d; --fill: #6f9fd0; --pale: #2d3a49; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 24px 80px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; font-weight: 600; margin: 0; }
h2 { font-size: 18px; font-weight: 600; margin: 48px 0 4px; }
h3 { font-size: 15px; font-weight: 600; margin: 28px 0 8px; }
p { color: var(--soft); margin: 0 0 12px; max-width: 760px; }
nav { margin: 12px 0 0; } nav a { color: var(--fill); margin-right: 16px; text-decoration: none; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; font-size: 13px; text-align: left; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
.number { text-align: right; white-space: nowrap; }
.why { color: var(--soft); font-size: 13px; }
.bar { width: 220px; }
svg { display: block; } .fill { fill: var(--fill); } .pale { fill: var(--pale); }
.wall { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; } figure div { display: flex; gap: 2px; }
img { height: 96px; width: auto; max-width: 240px; object-fit: contain; display: block; border-radius: 3px; }
figcaption { color: var(--soft); font-size: 12px; line-height: 1.4; max-width: 240px; overflow-wrap: anywhere; }
"""


def write_report(connection: Any, path: Path, read: ReadRange, *, num_pictures: int = _NUM_PICTURES) -> None:
    """Write the page of a run.

    Args:
        connection: of ``curation.query.connect``.
        path: of the file.
        read: reads a range of an object of the pool.
        num_pictures: shown of the set, and of each reason.
    """
    path.write_text(page(connection, read, num_pictures=num_pictures), encoding="utf-8")


def page(connection: Any, read: ReadRange, *, num_pictures: int = _NUM_PICTURES) -> str:
    """The page as text; the same run gives the same text."""
    rows = funnel(connection)
    sources = _dicts(connection, "sources")
    names = {role: [row["name"] for row in sources if row["role"] == role] for role in ("pool", "query", "benchmark")}
    told = "; ".join(
        f"{text}: {', '.join(names[role])}"
        for role, text in (("pool", "from"), ("query", "for the sets"), ("benchmark", "kept apart from"))
        if names[role]
    )
    body = [
        f"<h1>{_headline(rows)}</h1>",
        f"<p>{escape(told)}</p>",
        '<nav><a href="#funnel">funnel</a><a href="#reasons">reasons</a><a href="#composition">composition</a>'
        '<a href="#query-sets">query sets</a><a href="#copies">copies</a><a href="#leakage">leakage</a>'
        '<a href="#hosts">hosts</a><a href="#clusters">clusters</a><a href="#chosen">chosen</a>'
        '<a href="#dropped">dropped</a></nav>',
        *_funnel(rows),
        *_reasons(connection),
        *_composition(connection),
        *_query_sets(connection),
        *_copies(connection),
        *_leakage(connection),
        *_hosts(connection),
        *_clusters(connection),
        *_chosen(chosen(connection, read, num_pictures)),
        *_dropped(dropped(connection, read, num_pictures)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_headline(rows)}</title>\n<style>{_STYLE}{STYLE_OF_COPIES}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _headline(rows: Sequence[FunnelRow]) -> str:
    if not rows:
        return "Nothing is judged yet"
    num_left = {row.stage: row.num_left for row in rows}
    if "set" not in num_left:
        return f"{rows[-1].num_left:,} of {rows[0].num_in:,} lines left after {escape(rows[-1].stage)}"
    samples = f"{num_left['samples']:,} samples of " if "samples" in num_left else ""
    return f"{samples}{num_left['set']:,} pictures from {rows[0].num_in:,} lines"


# Tables


def _funnel(rows: Sequence[FunnelRow]) -> Iterator[str]:
    yield _heading("funnel", "Funnel", "What each verdict left of the lines of the pool, and why the others went.")
    if not rows:
        yield "<p>No verdict has been given yet.</p>"
        return
    num_lines = rows[0].num_in
    body = [["lines", "", f"{num_lines:,}", "", _bar(1.0), ""]]
    for row in rows:
        why = ", ".join(f"{escape(reason)} {count:,}" for reason, count in row.reasons.items())
        name = {"as_is": "as-is sets", "set": "the set", "samples": "its samples"}.get(row.stage, row.stage)
        of_pool = row.stage not in ("as_is", "set", "samples") and num_lines > 0
        share = row.num_left / num_lines if of_pool else 0.0
        bar = _bar(share, row.num_in / num_lines) if of_pool else ""
        left = f"+{row.num_left:,}" if row.stage == "as_is" else f"{row.num_left:,}"
        gone = f"−{row.num_dropped:,}" if row.num_dropped else ""
        body.append([escape(name), gone, left, f"{share:.1%}" if of_pool else "", bar, why])
    yield _table(["verdict", "dropped", "left", "of all", "", "why"], body, numbers=(1, 2, 3), why=5)


def _reasons(connection: Any) -> Iterator[str]:
    rows = _dicts(connection, "reasons")
    yield _heading("reasons", "Where lines ended", "Every line of the pool is counted once.")
    most = max((row["share"] for row in rows), default=1.0)
    body = [
        [
            escape(row["stage"]),
            escape(row["reason"] or ""),
            f"{row['num_lines']:,}",
            f"{row['share']:.1%}",
            _bar(row["share"] / most),
        ]
        for row in rows
    ]
    yield _table(["stage", "reason", "lines", "share", ""], body, numbers=(2, 3))


def _composition(connection: Any) -> Iterator[str]:
    rows = _dicts(connection, "composition")
    yield _heading("composition", "What the set is made of", "Samples by the curated set that they were chosen for.")
    most = max((row["share"] for row in rows), default=1.0)
    body = [
        [
            escape(row["part"]),
            f"{row['num_samples']:,}",
            f"{row['num_pictures']:,}",
            f"{row['share']:.1%}",
            _bar(row["share"] / most),
            f"{row['num_queries']:,}" if row["num_queries"] else "",
            _decimal(row["mean_similarity"]),
            f"{row['num_blurred']:,}",
            f"{row['median_width_px']:,} × {row['median_height_px']:,}",
        ]
        for row in rows
    ]
    names = [
        "part",
        "samples",
        "pictures",
        "share",
        "",
        "queries answered",
        "mean similarity",
        "with blurred faces",
        "median size",
    ]
    yield _table(names, body, numbers=(1, 2, 3, 5, 6, 7, 8))


def _query_sets(connection: Any) -> Iterator[str]:
    rows = query_sets(connection)
    if not rows:
        return
    text = "Nominal counts, retrieved and unique ones: a picture that several queries asked for is retrieved as often."
    yield _heading("query-sets", "What the sets asked for and got", text)
    names = {
        "query_set": "set",
        "mode": "mode",
        "num_images": "images",
        "num_nominal": "nominal",
        "num_retrieved": "retrieved",
        "shortfall": "shortfall",
        "num_taken": "under the cap",
        "num_unique": "unique",
        "num_collisions": "collisions",
        "recall": "recall",
        "num_final": "in the set",
    }
    body = [[escape(told(key, row[key])) for key in names] for row in rows]
    yield _table(list(names.values()), body, numbers=tuple(range(2, len(names))))
    yield from (f"<p>{escape(note)}</p>" for note in notes(rows))


def _copies(connection: Any) -> Iterator[str]:
    rows = _dicts(connection, "component_sweep")
    if len(rows) < 2:
        return
    in_use = [told_of_threshold(row) for row in rows if row["in_use"]]
    text = " ".join([*in_use, "The curves tell what other thresholds would do."])
    yield _heading("copies", "Copies", text)
    yield from (f"<p>{escape(line)}</p>" for line in told_of_search(_dicts(connection, "edge_recall")))
    yield sweep_svg(rows)
    sizes = classes_of_sizes(_dicts(connection, "component_sizes"))
    if sizes:
        most = max(share for *_, share in sizes)
        body = [[name, f"{n:,}", f"{m:,}", f"{share:.2%}", _bar(share / most)] for name, n, m, share in sizes]
        yield "<h3>Components at the threshold in use</h3>"
        yield _table(["pictures in one", "components", "pictures", "of all", ""], body, numbers=(1, 2, 3))


def _leakage(connection: Any) -> Iterator[str]:
    rows = _dicts(connection, "leakage")
    if not rows:
        return
    text = (
        "Pictures that were dropped because a benchmark holds them too, and how much of each benchmark was found. "
        "Pairs stand below, among the dropped pictures."
    )
    yield _heading("leakage", "Benchmarks", text)
    body = [
        [
            escape(row["benchmark"]),
            f"{row['num_images']:,}",
            f"{row['num_matched']:,}",
            "" if row["share"] is None else f"{row['share']:.1%}",
            *(f"{row[key]:,}" for key in ("num_dropped", "num_direct", "num_through", "num_as_is")),
            _decimal(row["max_similarity"]),
            _decimal(row["median_similarity"]),
        ]
        for row in rows
    ]
    names = ["benchmark", "pictures", "found", "share", "dropped", "by an edge", "through copies", "of as-is sets"]
    yield _table([*names, "highest similarity", "median"], body, numbers=tuple(range(1, 10)))


def _hosts(connection: Any) -> Iterator[str]:
    rows = _dicts(connection, "hosts")
    text = f"The {_NUM_HOSTS} with most lines, of {len(rows):,}. Dark: lines in the set; pale: lines that gave bytes."
    yield _heading("hosts", "Hosts", text)
    body = [
        [
            escape(row["host"] or "none"),
            f"{row['num_lines']:,}",
            f"{row['num_fetched']:,}",
            f"{row['num_kept']:,}",
            _bar(row["num_kept"] / row["num_lines"], row["num_fetched"] / row["num_lines"]),
            escape(row["main_reason"] or ""),
        ]
        for row in rows[:_NUM_HOSTS]
    ]
    yield _table(["host", "lines", "fetched", "in the set", "", "most go for"], body, numbers=(1, 2, 3), why=5)


def _clusters(connection: Any) -> Iterator[str]:
    rows = _dicts(connection, "clusters")
    text = f"{len(rows):,} clusters by size. Pale: pictures of the pool; dark: those of them that were chosen."
    yield _heading("clusters", "Clusters", text)
    if rows:
        yield _chart([(row["num_pool"], row["num_chosen"]) for row in rows])


# Pictures


def _chosen(pictures: Sequence[Thumbnail]) -> Iterator[str]:
    text = "A draw from the set. On the right the query that asked for the picture, where one did."
    yield _heading("chosen", "Chosen pictures", text)
    yield _wall((picture, picture.stage) for picture in pictures)


def _dropped(pictures: Sequence[Thumbnail]) -> Iterator[str]:
    text = (
        "A draw for each reason. On the right what the picture was held against: the one kept for its group, the one "
        "that it is too like, or the picture of a benchmark. Explicit pictures are shown as a few cells."
    )
    yield _heading("dropped", "Dropped pictures", text)
    for (stage, reason), group in groupby(pictures, key=lambda picture: (picture.stage, picture.reason)):
        yield f"<h3>{escape(stage)}: {escape(reason or '')}</h3>"
        yield _wall((picture, "") for picture in group)


def _wall(pictures: Iterable[tuple[Thumbnail, str]]) -> str:
    figures = []
    for picture, label in pictures:
        images = f'<img src="{picture.source}" alt="{picture.image_id}" title="{escape(picture.address)}">'
        if picture.other_source:
            images += f'<img src="{picture.other_source}" alt="{picture.other_id}" title="{picture.other_id}">'
        judged = _decimal(picture.score)
        if picture.threshold is not None:
            judged += f" / {_decimal(picture.threshold)}"
        caption = " · ".join(text for text in (escape(label), judged) if text)
        figures.append(f"<figure><div>{images}</div><figcaption>{picture.image_id}<br>{caption}</figcaption></figure>")
    return f'<div class="wall">{"".join(figures)}</div>'


# Pieces


def _heading(anchor: str, title: str, text: str) -> str:
    return f'<h2 id="{anchor}">{escape(title)}</h2>\n<p>{escape(text)}</p>'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int], why: int = -1) -> str:
    """Rows of cells that are HTML already."""
    kinds = [
        "number" if n in numbers else "why" if n == why else "bar" if not name else "" for n, name in enumerate(names)
    ]
    opened = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(opened, names, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(opened, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _bar(fill: float, pale: float = 0.0) -> str:
    """A bar of two lengths, 0 to 1: ``fill`` over ``pale``."""
    under = f'<rect class="pale" width="{200 * pale:.1f}" height="10" rx="2"/>' if pale > fill else ""
    return f'<svg width="200" height="10">{under}<rect class="fill" width="{200 * fill:.1f}" height="10" rx="2"/></svg>'


def _chart(pairs: Sequence[tuple[int, int]]) -> str:
    """Bars from the largest to the smallest; many clusters share one bar, which shows their mean."""
    num_bars = min(len(pairs), _NUM_BARS)
    edges = [len(pairs) * n // num_bars for n in range(num_bars + 1)]
    groups = [pairs[start:stop] for start, stop in pairwise(edges)]
    means = [tuple(sum(pair[n] for pair in group) / len(group) for n in range(2)) for group in groups]
    most = max(max(pair) for pair in means) or 1.0
    width = 1000 / num_bars
    bars = "".join(
        f'<rect class="{kind}" x="{n * width:.2f}" y="{_CHART_HEIGHT * (1 - pair[which] / most):.2f}" '
        f'width="{width * 0.85:.2f}" height="{_CHART_HEIGHT * pair[which] / most:.2f}"/>'
        for which, kind in enumerate(("pale", "fill"))
        for n, pair in enumerate(means)
    )
    return (
        f'<svg width="100%" height="{_CHART_HEIGHT}" viewBox="0 0 1000 {_CHART_HEIGHT}" preserveAspectRatio="none">'
        f"{bars}</svg>\n<p>Largest bar: {most:,.0f} pictures.</p>"
    )


def _decimal(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3g}"  # noqa: PLR0124 - NaN is what pandas makes of null


def _dicts(connection: Any, name: str) -> list[dict[str, Any]]:
    """Rows of a report, of a view or of a table, missing values as None."""
    frame = run_sql(connection, name) if name != "sources" else connection.execute("SELECT * FROM sources").df()
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]
