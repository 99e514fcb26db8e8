"""An estimate as text: one table, what dominates, what it rests on."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.estimate.estimate import Estimate, Line

_HEAD = (
    "stage", "rows in", "rows out", "read", "written", "CPU", "GPU", "wall", "machines", "USD", "memory",
)  # fmt: skip
_WIDTHS = (19, 15, 15, 9, 9, 10, 10, 10, 9, 9, 9)
_SETS = {"query": "query sets", "benchmark": "benchmarks"}
_NUM_NAMED = 8  # assumptions


def format_estimate(found: Estimate) -> Iterator[str]:
    """All lines of an estimate."""
    yield from _sources(found)
    yield ""
    yield _row(_HEAD)
    for line in found.lines:
        yield _row(_cells(line))
    total = found.total
    yield _row(
        (
            "total", "", "", "", bytes_text(total.kept_bytes), time_text(total.cpu_s), time_text(total.gpu_s),
            time_text(total.wall_s), _machines(found.num_machines), usd_text(total.usd_hours),
            bytes_text(total.memory_bytes),
        )
    )  # fmt: skip
    yield ""
    yield from _legend(found)
    yield ""
    yield from _rests_on(found)


def _row(cells: tuple[str, ...]) -> str:
    first, *rest = cells
    widths = iter(_WIDTHS)
    return (
        first.ljust(next(widths)) + "".join(cell.rjust(width) for cell, width in zip(rest, widths, strict=True))
    ).rstrip()


def _cells(line: Line) -> tuple[str, ...]:
    work, cost = line.work, line.cost
    return (
        work.stage,
        rows_text(work.rows_in),
        "" if work.rows_out is None else rows_text(work.rows_out),
        bytes_text(work.read_bytes + work.download_bytes),
        bytes_text(work.kept_bytes + work.scratch_bytes),
        time_text(cost.cpu_s),
        time_text(cost.gpu_s),
        time_text(cost.wall_s),
        _machines(line.num_machines),
        usd_text(cost.usd),
        bytes_text(work.memory_bytes),
    )


def _machines(num: int | None) -> str:
    return "none" if num is None else f"{num:,}"


def _sources(found: Estimate) -> Iterator[str]:
    yield f"estimate of {found.recipe}: nothing is started, what is done already is not subtracted"
    yield "sources"
    for name, count in found.flow.counts.items():
        if name not in found.references:
            yield f"  {name:<20}{count.rows:>15,} rows   {count.source}"
    for role in ("query", "benchmark"):
        counts = [found.flow.counts[name] for name, its in found.references.items() if its == role]
        if counts:
            why = "; ".join(dict.fromkeys(count.source for count in counts))
            what = f"{len(counts)} {_SETS[role]}"
            yield f"  {what:<20}{sum(count.rows for count in counts):>15,} rows   {why}"
    yield "kept by each verdict"
    for verdict, share in found.flow.shares.items():
        yield f"  {verdict:<12}{share.value:>7.1%}   {share.source}"


def _legend(found: Estimate) -> Iterator[str]:
    cluster, total, rates = found.cluster, found.total, found.rates
    gpus = f", {cluster.gpu_workers:,.0f} with a GPU" if total.gpu_s else ""
    whose = "CPUs of this machine: execution.workers is null" if found.cluster_is_this_machine else "of the recipe"
    yield (
        f"cluster   {cluster.workers:,.0f} workers{gpus}, {cluster.fetchers:,.0f} fetchers ({whose}), each with a "
        "core to itself; stages one after the other, though those by shard overlap"
    )
    if total.gpu_s:
        yield "GPU       time for which one is held: its worker decodes and writes on a core of its own meanwhile"
    shape = f"{rates['machine.cpus']:g} cores, {rates['machine.gpus']:g} GPU and {rates['machine.gbit']:g} Gbit/s"
    if found.num_machines is None:
        longest = max((line for line in found.lines if line.num_machines is None), default=None, key=_wall)
        because = f": {longest.work.stage} alone has too few tasks" if longest else ""
        yield f"machines  no number of {shape} does it in {found.hours:g} h{because}"
    else:
        yield f"machines  {found.num_machines:,} of {shape} do it in {found.hours:g} h; in the table, that stage alone"
    yield (
        f"money     {usd_text(total.usd)} USD: {usd_text(total.usd_hours)} of hours of work, "
        f"{usd_text(total.usd_storage)} for a month of storage, {usd_text(total.usd_egress)} to take the tars out"
    )
    yield f"held      {usd_text(total.usd_held)} USD in place of the hours of work, if the cluster is kept all the time"
    yield (
        f"storage   {bytes_text(total.kept_bytes)} at the end, {bytes_text(total.peak_bytes)} at most on the way; "
        f"{bytes_text(total.download_bytes)} come from the web"
    )
    yield f"memory    {bytes_text(total.memory_bytes)} for the largest task of a worker"
    by_usd = sorted(found.lines, key=lambda line: -line.cost.usd)[:3]
    by_wall = sorted(found.lines, key=lambda line: -line.cost.wall_s)[:3]
    for what, lines, values in (
        ("dearest", by_usd, [line.cost.usd / (total.usd_hours or 1) for line in by_usd]),
        ("longest", by_wall, [line.cost.wall_s / (total.wall_s or 1) for line in by_wall]),
    ):
        named = (f"{line.work.stage} {value:.0%}" for line, value in zip(lines, values, strict=True))
        yield f"{what:<10}{', '.join(named)}"


def _wall(line: Line) -> float:
    return line.cost.wall_s


def _rests_on(found: Estimate) -> Iterator[str]:
    used = found.rates.used.values()
    num_assumed = sum(not rate.measured for rate in used)
    yield (
        f"{len(found.rates.used)} rates of pipelines/estimate/rates.yaml, {num_assumed} of them assumed, not measured. "
        "Those that matter, and the totals if twice as much:"
    )
    for one in found.assumptions[:_NUM_NAMED]:
        source = one.source if len(one.source) <= 100 else f"{one.source[:97]}..."
        yield f"  {one.name:<20}{one.value:>9g} {one.unit:<18} USD x{one.usd_factor:.2f}, time x{one.wall_factor:.2f}"
        yield f"  {'':<20}{source}"
    if len(found.assumptions) > _NUM_NAMED:
        rest = ", ".join(one.name for one in found.assumptions[_NUM_NAMED:])
        yield f"  and less: {rest}"


# Units


def rows_text(rows: float) -> str:
    """1234567.8 as ``1,234,568``."""
    return f"{rows:,.0f}"


def bytes_text(num: float) -> str:
    """1,234,567 as ``1.2 MB``."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num >= unit:
            return f"{num / unit:.1f} {name}"
    return f"{num:.0f} B"


def time_text(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, hours above, whole ones above a hundred."""
    if seconds == 0:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def usd_text(usd: float) -> str:
    """Cents below a hundred, whole ones above."""
    return f"{usd:,.2f}" if usd < 100 else f"{usd:,.0f}"
