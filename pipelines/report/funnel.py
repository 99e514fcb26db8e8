"""The funnel: how many rows each verdict left of the pool, and why the others went."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from curation.schema import VERDICTS

_WHY_COLUMNS = 70


@dataclass(frozen=True, kw_only=True)
class FunnelRow:
    """One step of the funnel."""

    # A verdict; ``as_is`` for the sets that are taken as they are; ``set`` for the pictures that are in the set, and
    # ``samples`` for how often they are.
    stage: str
    num_in: int
    num_dropped: int
    num_left: int
    reasons: dict[str, int]  # why rows were dropped, most first


def funnel(connection: Any) -> list[FunnelRow]:
    """Steps of a run, in order: verdicts over the pool that have run, then as-is sets, then the whole set.

    Args:
        connection: of ``curation.query.connect``.

    Returns:
        Verdicts that no row has met yet are left out, and so are the rows after them as long as nothing was selected.
        Samples are told where there are more of them than pictures.
    """
    query = "SELECT role, stage, reason, num_rows FROM funnel_steps ORDER BY role, place, num_rows DESC, reason"
    steps: dict[tuple[str, str], FunnelRow] = {}
    for role, stage, reason, num_rows in connection.execute(query).fetchall():
        old = steps.get((role, stage), FunnelRow(stage=stage, num_in=0, num_dropped=0, num_left=0, reasons={}))
        steps[role, stage] = FunnelRow(
            stage=stage,
            num_in=old.num_in + num_rows,
            num_dropped=old.num_dropped + (num_rows if reason is not None else 0),
            num_left=old.num_left + (num_rows if reason is None else 0),
            reasons=old.reasons if reason is None else {**old.reasons, reason: num_rows},
        )
    rows = [steps["pool", stage] for stage in VERDICTS if ("pool", stage) in steps]
    as_is = steps.get(("as_is", "selection"))
    num_chosen = rows[-1].num_left if rows and rows[-1].stage == "selection" else None
    if as_is is not None:
        rows.append(
            FunnelRow(
                stage="as_is",
                num_in=as_is.num_in,
                num_dropped=as_is.num_dropped,
                num_left=as_is.num_left,
                reasons=as_is.reasons,
            )
        )
    if num_chosen is not None or as_is is not None:
        total = (num_chosen or 0) + (as_is.num_left if as_is is not None else 0)
        rows.append(FunnelRow(stage="set", num_in=total, num_dropped=0, num_left=total, reasons={}))
        (num_samples,) = connection.execute("SELECT count(*) FROM choices").fetchone()
        if num_samples > total:
            rows.append(FunnelRow(stage="samples", num_in=total, num_dropped=0, num_left=num_samples, reasons={}))
    return rows


def format_funnel(rows: list[FunnelRow]) -> str:
    """The funnel as a table for the terminal; shares are of the lines of the pool."""
    if not rows:
        return "no verdict yet"
    num_lines = rows[0].num_in
    lines = [f"{'stage':<12}{'dropped':>14}{'left':>14}{'share':>8}  why", f"{'lines':<12}{'':>14}{num_lines:>14,}"]
    for row in rows:
        if row.stage in ("set", "samples"):
            lines.append(f"{row.stage:<12}{'':>14}{row.num_left:>14,}")
        elif row.stage == "as_is":
            lines += _with_reasons(f"{'as-is sets':<12}{_dropped(row):>14}{f'+{row.num_left:,}':>14}{'':>8}", row)
        else:
            share = f"{row.num_left / num_lines:.1%}" if num_lines else ""
            lines += _with_reasons(f"{row.stage:<12}{_dropped(row):>14}{row.num_left:>14,}{share:>8}", row)
    return "\n".join(lines)


def _dropped(row: FunnelRow) -> str:
    return f"-{row.num_dropped:,}" if row.num_dropped else "0"


def _with_reasons(start: str, row: FunnelRow) -> list[str]:
    """A line of the table and its reasons, which go on below where they are many."""
    # A no-break space until the text is cut, so that no count is torn from its reason.
    why = ", ".join(f"{reason}\xa0{count:,}" for reason, count in row.reasons.items())
    first, *more = [text.replace("\xa0", " ") for text in textwrap.wrap(why, _WHY_COLUMNS)] or [""]
    return [f"{start}  {first}".rstrip(), *(" " * (len(start) + 2) + text for text in more)]
