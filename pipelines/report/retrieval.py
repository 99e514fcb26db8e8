"""What the query sets asked for and what they got, as a table of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from curation.query import run_sql

_COLUMNS = {
    "query_set": "query set",
    "mode": "mode",
    "num_nominal": "nominal",
    "num_retrieved": "retrieved",
    "shortfall": "shortfall",
    "num_taken": "under cap",
    "num_unique": "unique",
    "num_collisions": "collisions",
    "recall": "recall",
    "num_final": "in the set",
}


def query_sets(connection: Any) -> list[dict[str, Any]]:
    """Rows of the report ``query_sets`` as plain numbers and text, missing values as None.

    Args:
        connection: of ``curation.query.connect``.
    """
    frame = run_sql(connection, "query_sets")
    plain = frame.astype(object).where(frame.notna(), None)
    rows = [dict(zip(plain.columns, row, strict=True)) for row in plain.values.tolist()]
    return [{key: _whole(key, value) for key, value in row.items()} for row in rows]


def _whole(key: str, value: Any) -> Any:
    """Counts as integers: a column with a missing one comes as floats."""
    return int(value) if isinstance(value, float) and key != "recall" else value


def format_retrieval(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows of ``query_sets`` as lines, and what is to be known about them."""
    if not rows:
        return
    cells = [list(_COLUMNS.values()), *([told(key, row[key]) for key in _COLUMNS] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    for line in cells:
        padded = [
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()
    yield from notes(rows)


def told(key: str, value: Any) -> str:
    """One value as text."""
    if value is None:
        return ""
    if key == "recall":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the counts do not say themselves, a line each."""
    for row in rows:
        if row["num_short"]:
            of_clusters = f"{row['num_short']:,} of {row['num_clusters']:,} clusters hold fewer than was asked of them"
            yield f"{row['query_set']}: {of_clusters} (lvd sql shortfall)"
        if row["num_test_matches"]:
            pictures = f"{row['num_test_matches']:,} of its {row['num_queries']:,} pictures"
            yield f"{row['query_set']}: {pictures} match a benchmark and are left out (lvd sql leaks)"
        if row["recall"] is not None:
            queries = f"{row['num_sampled']:,} of {row['num_queries']:,} queries"
            yield f"{row['query_set']}: recall {row['recall']:.2%}, of the neighbours of {queries}"
