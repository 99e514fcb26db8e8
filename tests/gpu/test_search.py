"""The search of neighbours on a GPU finds what it finds on the CPU, to the byte."""

import numpy as np
import pytest
import torch

from curation.retrieve import search

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("probes", [1, 8, 64])
def test_a_gpu_finds_the_same_neighbours(probes):
    rng = np.random.default_rng(0)

    def unit(num: int) -> np.ndarray:
        values = rng.normal(size=(num, 96))
        return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float16)

    queries, pool, centroids = unit(500), unit(20_000), unit(64)
    pool[100:400] = pool[100]  # only ties tell them apart
    near = search.nearest_lists(queries, centroids, probes)
    cluster = np.sort(rng.integers(0, 64, len(pool)).astype(np.int32))
    found = []
    for device in ("cpu", "cuda"):
        lists = search.search_lists(queries, pool, cluster=cluster, probes=near, k=7, device=device)
        everything = search.search_all(queries, pool, k=7, device=device)
        found.append([best(pairs, 7) for pairs in (lists, everything)])
    assert found[0] == found[1]


def best(pairs: search.Pairs, k: int) -> list[tuple[int, int, float]]:
    order = np.lexsort((pairs.pool, -pairs.similarity, pairs.query))
    order = order[search.rank_in(pairs.query[order]) < k]
    return list(zip(*(column[order].tolist() for column in pairs), strict=True))
