"""Killed at random moments, on other executors, on two nodes, on an object store: no byte differs."""

import contextlib
import os
import random
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RAY = ("execution.executor=ray", "execution.workers=2", "execution.fetchers=1")


def ray_workers(process) -> list[psutil.Process]:
    """Worker processes of a driver: the actors that run jobs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        return [child for child in family if "ray::_Worker" in " ".join(child.cmdline() or [child.name()])]
    return []


def disturb(lab, folder: Path, kind: str, delay_s: float, *more: str) -> bool:
    """Start a run and kill a part of it after a while; whether it was still at work."""
    process = lab.start(folder, *more)
    time.sleep(delay_s)
    if kind == "worker":
        lab.wait_until(lambda: ray_workers(process) or process.poll() is not None)
        for victim in ray_workers(process)[:1]:
            victim.kill()
        output, _ = process.communicate(timeout=300)
        assert process.returncode in (0, 1), output
        return True
    alive = process.poll() is None
    if alive and kind == "driver":
        process.kill()
        process.wait()
    elif alive:
        lab.kill_group(process)
    process.stdout.close()
    return alive


@pytest.mark.parametrize(
    ("kind", "executor"),
    [
        pytest.param("driver", ("execution.executor=inline",), marks=pytest.mark.matrix),  # as many seeds of the matrix
        ("worker", RAY),
        ("everything", RAY),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(lab, undisturbed, tmp_path, kind, executor):
    moment = random.Random(kind).uniform(6.0, 14.0)
    disturb(lab, tmp_path, kind, moment, *executor)
    lab.finish(tmp_path)
    lab.assert_same(tmp_path, undisturbed)


@pytest.mark.matrix
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(10))
def test_the_kill_matrix(lab, undisturbed, tmp_path, seed):
    """Twenty moments: two kills a seed, the command again after each."""
    dice = random.Random(seed)
    kind = dice.choice(["driver", "worker", "everything"])
    executor = RAY if kind == "worker" or dice.random() < 0.5 else ("execution.executor=inline",)
    for _ in range(2):
        disturb(lab, tmp_path, kind, dice.uniform(2.0, 25.0), *executor)
    lab.finish(tmp_path)
    lab.assert_same(tmp_path, undisturbed)


@pytest.mark.matrix
@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_no_byte(lab, undisturbed, tmp_path, workers):
    lab.finish(tmp_path, "execution.executor=ray", f"execution.workers={workers}")
    lab.assert_same(tmp_path, undisturbed)


def test_two_nodes_one_of_which_dies(lab, undisturbed, tmp_path):
    from ray.cluster_utils import Cluster

    # A dead node is noticed after three missed answers; the defaults take half a minute.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": quick}
    )
    try:
        second = cluster.add_node(num_cpus=2)
        environment = {"RAY_ADDRESS": cluster.address}
        process = lab.start(tmp_path, "execution.executor=ray", "execution.workers=4", environment=environment)
        part = tmp_path / "pool" / "hashes"
        lab.wait_until(lambda: len(list(part.rglob("*.parquet"))) >= 2 or process.poll() is not None)
        assert process.poll() is None
        cluster.remove_node(second, allow_graceful=False)
        output, _ = process.communicate(timeout=400)
        assert process.returncode in (0, 1), output
    finally:
        cluster.shutdown()
    lab.assert_same(tmp_path, undisturbed)


def test_a_run_on_an_object_store_has_the_same_digests(lab, undisturbed, tmp_path, bucket_server):
    import obstore
    from obstore.store import S3Store

    bucket = bucket_server.new_bucket()
    client = S3Store(bucket, config={"allow_http": "true"})
    lab.curate(f"s3://{bucket}")
    for batch in obstore.list(client):
        for item in batch:
            target = tmp_path / item["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(obstore.get(client, item["path"]).bytes()))
    assert lab.curate(f"s3://{bucket}").summary.num_jobs == 0
    lab.assert_same(tmp_path, undisturbed)


def test_two_drivers_at_once_are_one_too_many(lab, undisturbed, tmp_path):
    from curation.lease import Lease
    from curation.store import open_store

    folder = lab.copy(undisturbed, tmp_path / "copy")
    lease = Lease(open_store(f"{folder}/pool"), tmp_path)
    try:
        process = lab.start(folder, "safety.max_aspect=7")
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert f"process {os.getpid()} on" in output
        assert len(output.splitlines()) == 1
    finally:
        lease.release()
