"""Work times rates: hours, machines and money, by stage and in all. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.estimate.rates import Rates
from pipelines.estimate.work import Work

HOUR_S = 3600.0
MOST_MACHINES = 100_000


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What works at once.

    Attributes:
        workers: CPU workers.
        fetchers: workers that wait on the network.
        gpu_workers: workers that hold a GPU.
        visits: addresses that one fetcher waits for at once.
        gbit: of the network, Gbit/s; None: it is no limit.
        wait: rate of one visit.
    """

    workers: float
    fetchers: float
    gpu_workers: float
    visits: float
    gbit: float | None
    wait: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage takes; ``usd`` is of hours only."""

    cpu_s: float
    gpu_s: float  # for which a GPU is held, what its worker does on a core included
    wall_s: float
    usd: float


@dataclass(frozen=True, kw_only=True)
class Total:
    """What all stages take, one after the other, and what is there at the end."""

    cpu_s: float
    gpu_s: float
    wall_s: float
    usd_hours: float  # of work
    usd_held: float  # of the whole cluster, were it kept for all of wall_s
    usd_storage: float  # of one month
    usd_egress: float  # of the tars, once
    kept_bytes: float
    peak_bytes: float  # with the largest scratch, beside what was written until then
    download_bytes: float
    memory_bytes: float  # of the largest task

    @property
    def usd(self) -> float:
        """All of it, for hours of work."""
        return self.usd_hours + self.usd_storage + self.usd_egress


def cost_of(work: Work, cluster: Cluster, rates: Rates) -> Cost:
    """What one stage takes on a cluster.

    A worker with a GPU decodes, computes and writes by turns, so that the GPU is held for all of it. A fetcher waits
    for many addresses at once; the slowest of waiting, computing, the network and the largest host decides, which each
    fetcher may ask so often.
    """
    on_gpu = sum(rates.seconds(use.rate, use.amount) for use in work.uses if use.on_gpu)
    cpu_s = sum(rates.seconds(use.rate, use.amount) for use in work.uses if not use.on_gpu)
    cpu_s += rates.seconds("job", work.num_jobs)
    workers = cluster.gpu_workers if work.on_gpu else cluster.fetchers if work.visits else cluster.workers
    at_once = max(1.0, min(workers, work.num_tasks))
    start = f"start.{work.stage}"
    if start in rates and work.rows_in:
        cpu_s += rates.seconds(start, at_once)
    wall_s = (cpu_s + on_gpu) / at_once
    if work.visits:
        waiting = rates.seconds(cluster.wait, work.visits) / (at_once * cluster.visits)
        network = 8 * work.download_bytes / (cluster.gbit * 1e9) if cluster.gbit is not None else 0.0
        wall_s = max(wall_s, waiting, network, work.polite_s / at_once)
    gpu_s = cpu_s + on_gpu if work.on_gpu else 0.0
    cpu_s = 0.0 if work.on_gpu else cpu_s
    usd = (cpu_s * rates["price.cpu_hour"] + gpu_s * rates["price.gpu_hour"]) / HOUR_S
    return Cost(cpu_s=cpu_s, gpu_s=gpu_s, wall_s=wall_s, usd=usd)


def total_of(
    works: Sequence[Work], costs: Sequence[Cost], cluster: Cluster, rates: Rates, *, tar_bytes: float
) -> Total:
    """Sum of all stages.

    Args:
        works: of the stages, in order.
        costs: of the same.
        cluster: that they were priced on.
        rates: prices.
        tar_bytes: of the finished set, which are taken out of the cloud once.
    """
    wall_s = sum(cost.wall_s for cost in costs)
    gpus = cluster.gpu_workers if any(work.on_gpu for work in works) else 0.0
    kept = peak = 0.0
    for work in works:
        kept += work.kept_bytes
        peak = max(peak, kept + work.scratch_bytes)
    return Total(
        cpu_s=sum(cost.cpu_s for cost in costs),
        gpu_s=sum(cost.gpu_s for cost in costs),
        wall_s=wall_s,
        usd_held=wall_s / HOUR_S * (cluster.workers * rates["price.cpu_hour"] + gpus * rates["price.gpu_hour"]),
        usd_hours=sum(cost.usd for cost in costs),
        usd_storage=kept / 1e12 * rates["price.tb_month"],
        usd_egress=tar_bytes / 1e12 * rates["price.tb_egress"],
        kept_bytes=kept,
        peak_bytes=peak,
        download_bytes=sum(work.download_bytes for work in works),
        memory_bytes=max((work.memory_bytes for work in works), default=0.0),
    )


# Machines


def of_machines(cluster: Cluster, num: int, rates: Rates) -> Cluster:
    """So many machines of ``machine.*``."""
    return replace(
        cluster,
        workers=num * rates["machine.cpus"],
        fetchers=num * rates["machine.fetchers"],
        gpu_workers=num * rates["machine.gpus"],
        gbit=num * rates["machine.gbit"] if cluster.gbit is not None else None,
    )


def machines_for(works: Sequence[Work], cluster: Cluster, rates: Rates, *, hours: float) -> int | None:
    """The fewest machines that do these stages, one after the other, in so many hours.

    Returns:
        None where no number does: a stage of few tasks takes longer however many there are.
    """

    def is_enough(num: int) -> bool:
        some = of_machines(cluster, num, rates)
        return sum(cost_of(work, some, rates).wall_s for work in works) <= hours * HOUR_S

    if not is_enough(MOST_MACHINES):
        return None
    low, high = 1, MOST_MACHINES
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low
