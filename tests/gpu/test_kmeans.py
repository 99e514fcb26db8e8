"""k-means on the GPU: the bytes of the CPU."""

import numpy as np
import pytest
import torch

from curation.represent import kmeans
from curation.represent.nearest import Centroids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_nearest_centroids_are_those_of_the_cpu(precision):
    rng = np.random.default_rng(0)
    vectors, centroids = (rng.normal(size=(num, 384)) for num in (20_000, 2_000))
    vectors, centroids = (
        (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float16) for a in (vectors, centroids)
    )
    centroids[50:60] = centroids[3]  # ties
    wanted = kmeans.assign(vectors, centroids)
    found = Centroids(centroids, precision=precision, device="cuda").of(vectors)
    assert [column.tobytes() for column in found] == [column.tobytes() for column in wanted]


def test_a_fit_is_that_of_the_cpu():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(5_000, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    asked = {"num_clusters": 1_100, "iterations": 4, "seed": 0}
    wanted = kmeans.fit(vectors, **asked)
    assert kmeans.fit(vectors, **asked, device="cuda").tobytes() == wanted.tobytes()
