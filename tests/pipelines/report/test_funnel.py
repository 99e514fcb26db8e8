from itertools import pairwise
from typing import Any

from pipelines.report.funnel import FunnelRow, format_funnel, funnel


def test_steps_add_up_and_as_is_sets_come_before_the_last_row(small_run: Any):
    rows = funnel(small_run.connect())
    stages = ["screened", "fetched", "safety", "near", "duplicates", "leakage", "semantic"]
    stages += ["selection", "as_is", "set"]
    assert [row.stage for row in rows] == stages
    assert all(row.num_in == row.num_dropped + row.num_left for row in rows)
    assert all(row.num_dropped == sum(row.reasons.values()) for row in rows)
    assert all(before.num_left == after.num_in for before, after in pairwise(rows[:8]))
    assert (rows[0].num_in, rows[7].num_left, rows[8].num_left, rows[9].num_left) == (12, 4, 2, 6)
    assert rows[0].reasons == {"blocked_host": 1, "duplicate_url": 1}
    assert rows[7].reasons == {"not_retrieved": 1}


def test_a_run_that_is_not_through_ends_where_it_is(small_run: Any):
    for name in ("selection", "semantic", "leakage", "duplicates", "queries"):
        for part in (small_run.run / name).iterdir():
            part.unlink()
    rows = funnel(small_run.connect())
    assert [row.stage for row in rows] == ["screened", "fetched", "safety", "near"]
    assert "set" not in format_funnel(rows)


def test_text_is_aligned_with_separators_and_reasons():
    rows = [
        FunnelRow(
            stage="screened",
            num_in=1_234_567,
            num_dropped=34_567,
            num_left=1_200_000,
            reasons={"blocked_host": 34_000, "scheme": 567},
        ),
        FunnelRow(stage="selection", num_in=1_200_000, num_dropped=0, num_left=1_200_000, reasons={}),
        FunnelRow(stage="as_is", num_in=1_000, num_dropped=0, num_left=1_000, reasons={}),
        FunnelRow(stage="set", num_in=1_201_000, num_dropped=0, num_left=1_201_000, reasons={}),
    ]
    head, lines, screened, selection, as_is, last = format_funnel(rows).splitlines()
    assert lines.split() == ["lines", "1,234,567"]
    assert screened.split()[:4] == ["screened", "-34,567", "1,200,000", "97.2%"]
    assert screened.endswith("blocked_host 34,000, scheme 567")
    assert as_is.split()[-1] == "+1,000"
    assert last.split() == ["set", "1,201,000"]
    end = head.index("left") + 4
    assert all(row[:end].rstrip()[-1] == "0" and row[end - 1] == "0" for row in (screened, selection, as_is, last))


def test_many_reasons_go_on_below():
    reasons = {f"reason_number_{n}": 1_000 for n in range(12)}
    row = FunnelRow(stage="fetched", num_in=12_000, num_dropped=12_000, num_left=0, reasons=reasons)
    text = format_funnel([row])
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(f"{reason} 1,000" in " ".join(text.split()) for reason in reasons)
    assert text.splitlines()[3].startswith(" " * 50 + "reason_number_")


def test_nothing_judged_yet():
    assert format_funnel([]) == "no verdict yet"
