"""The join of copy descriptors on the GPU: the bytes of the CPU."""

import numpy as np
import pytest
import torch

from curation.dedup.join import Members, assign, fit_centroids, join_list, join_references

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_edges_are_those_of_the_cpu():
    draw = np.random.default_rng(0)
    base = np.repeat(draw.standard_normal((4000, 256)), 3, axis=0)
    rows = base + draw.standard_normal(base.shape) * draw.uniform(0.1, 1.2, (len(base), 1))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vectors = rows.astype(np.float16).astype(np.float32)
    seen = assign(vectors, fit_centroids(vectors, 8, seed=0), 4)
    members = Members(np.arange(len(vectors), dtype=np.int64), vectors, seen[:, 0], seen)
    for number in range(8):
        here, there = (join_list(members, number, 0.5, device) for device in ("cpu", "cuda"))
        assert [column.tobytes() for column in here] == [column.tobytes() for column in there]
        here, there = (join_references(members, members, number, 0.5, device) for device in ("cpu", "cuda"))
        assert [column.tobytes() for column in here] == [column.tobytes() for column in there]
