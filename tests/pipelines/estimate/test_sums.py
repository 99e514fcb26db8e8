"""Sums by hand: two rates, three stages."""

import pytest

from pipelines.estimate.computing import Use, vit_gflop
from pipelines.estimate.flow import num_drawn
from pipelines.estimate.rates import Rate, Rates
from pipelines.estimate.sums import Cluster, cost_of, machines_for, total_of
from pipelines.estimate.work import Work
from training.config import ConfigError

CLUSTER = Cluster(workers=4, fetchers=2, gpu_workers=2, visits=10, gbit=8, wait="wait.visit")


def rates(**values):
    units = {
        "stages.read": (2.0, "CPU ms a row"), "net.gpu": (500.0, "GFLOP/s a GPU"), "job": (100.0, "CPU ms a job"),
        "wait.visit": (3.0, "s a visit"), "start.near": (1.5, "CPU s a worker"),
        "price.cpu_hour": (0.5, "USD"), "price.gpu_hour": (3.0, "USD"), "price.tb_month": (20.0, "USD"),
        "price.tb_egress": (100.0, "USD"), "machine.cpus": (10.0, "cores"), "machine.gpus": (1.0, "GPUs"),
        "machine.gbit": (1.0, "Gbit/s"), "machine.fetchers": (2.0, "fetchers"),
    }  # fmt: skip
    return Rates(
        {name: Rate(value=values.get(name, value), unit=unit, measured=True, source="by hand")
         for name, (value, unit) in units.items()}
    )  # fmt: skip


def work(**values):
    return Work(**({"stage": "read", "rows_in": 1, "rows_out": 1, "uses": ()} | values))


def test_a_stage_on_processors():
    # 1,800,000 rows of 2 ms are 3,600 s, 36 jobs of 100 ms 3.6 s
    cost = cost_of(work(uses=(Use("stages.read", 1_800_000),), num_jobs=36, num_tasks=36), CLUSTER, rates())
    assert cost.cpu_s == pytest.approx(3603.6)
    assert cost.wall_s == pytest.approx(3603.6 / 4)
    assert cost.gpu_s == 0
    assert cost.usd == pytest.approx(0.5 * 3603.6 / 3600)


def test_few_tasks_leave_workers_idle():
    cost = cost_of(work(uses=(Use("stages.read", 1_000_000),), num_jobs=0, num_tasks=1), CLUSTER, rates())
    assert cost.wall_s == cost.cpu_s == pytest.approx(2000)


def test_a_worker_with_a_gpu_holds_it_while_it_decodes():
    # 1,000 s of decoding on its core, 500,000 GFLOP at 500 a second are 1,000 s more
    uses = (Use("stages.read", 500_000), Use("net.gpu", 500_000, on_gpu=True))
    cost = cost_of(work(uses=uses, num_jobs=0, num_tasks=9, on_gpu=True), CLUSTER, rates())
    assert (cost.cpu_s, cost.gpu_s) == (0, pytest.approx(2000))
    assert cost.wall_s == pytest.approx(1000)
    assert cost.usd == pytest.approx(3.0 * 2000 / 3600)


def test_the_slowest_of_waiting_computing_and_the_network():
    fetch = work(uses=(Use("stages.read", 1000),), num_jobs=0, num_tasks=99, visits=1000, download_bytes=1e9)
    # 3,000 s of waiting by 20 at once; 2 s of computing by 2; 8 Gbit at 8 Gbit/s
    assert cost_of(fetch, CLUSTER, rates()).wall_s == pytest.approx(150)
    assert cost_of(fetch, CLUSTER, rates(**{"wait.visit": 0.0})).wall_s == pytest.approx(1)
    assert cost_of(fetch, CLUSTER, rates(**{"wait.visit": 0.0, "stages.read": 400.0})).wall_s == pytest.approx(200)

    # 500 s of asking one host, which both fetchers may
    polite = cost_of(work(visits=1000, num_jobs=0, num_tasks=99, polite_s=500), CLUSTER, rates())
    assert polite.wall_s == pytest.approx(250)


def test_a_first_run_compiles_once_a_worker():
    near = work(stage="near", num_jobs=0, num_tasks=3)
    assert cost_of(near, CLUSTER, rates()).cpu_s == pytest.approx(4.5)
    assert cost_of(work(stage="near", rows_in=0, num_jobs=0, num_tasks=3), CLUSTER, rates()).cpu_s == 0


def test_totals():
    works = [
        work(kept_bytes=1e12, download_bytes=5),
        work(kept_bytes=2e12, scratch_bytes=4e12, memory_bytes=7),
        work(uses=(Use("stages.read", 1_800_000),), kept_bytes=1e12),
    ]
    costs = [cost_of(one, CLUSTER, rates(job=0.0)) for one in works]
    total = total_of(works, costs, CLUSTER, rates(), tar_bytes=5e11)
    assert (total.kept_bytes, total.peak_bytes, total.download_bytes, total.memory_bytes) == (4e12, 7e12, 5, 7)
    assert (total.usd_hours, total.usd_storage, total.usd_egress) == (pytest.approx(0.5), 80, 50)
    assert total.usd == pytest.approx(130.5)
    # each stage has one task: an hour, in which four cores at 0.5 are kept, and no GPU
    assert total.usd_held == pytest.approx(2)


def test_the_fewest_machines():
    # 720,000 s on 10 cores a machine: 20 h on one, 2 h on ten
    many = work(uses=(Use("stages.read", 360_000_000),), num_jobs=0, num_tasks=1_000_000)
    assert machines_for([many], CLUSTER, rates(), hours=20) == 1
    assert machines_for([many], CLUSTER, rates(), hours=2) == 10
    assert machines_for([many, many], CLUSTER, rates(), hours=2) == 20
    one = work(uses=(Use("stages.read", 7_200_000),), num_jobs=0, num_tasks=1)  # 4 h
    assert machines_for([one], CLUSTER, rates(), hours=3) is None
    assert machines_for([one], CLUSTER, rates(), hours=5) == 1


def test_products_at_no_rate_are_an_error():
    with pytest.raises(ConfigError, match=r"--rate net\.gpu: got 0, allowed: above 0 \(GFLOP/s a GPU\)"):
        rates(**{"net.gpu": 0.0}).seconds("net.gpu", 1)


def test_pictures_that_are_drawn_twice_count_once():
    assert num_drawn(1000, 10) == pytest.approx(9.95, abs=0.01)
    assert num_drawn(1000, 1e6) == pytest.approx(1000)
    assert num_drawn(0, 5) == 0


def test_gflop_of_a_vision_transformer():
    assert vit_gflop("timm:vit_huge_patch16_224.in22k", None) == pytest.approx(255, rel=0.01)
    assert vit_gflop("timm:vit_small_patch14_dinov2.lvd142m", 224) == pytest.approx(12.25, rel=0.1)
    assert vit_gflop("timm:resnet50", 224) is None
