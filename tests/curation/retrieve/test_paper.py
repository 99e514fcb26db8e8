"""The words of the paper (Oquab et al. 2023, section 3), held by a whole run over 200 clusters of known fill.

Numbers are scaled down by 200: 50 pictures of each cluster instead of 10,000, so that a run takes a second.
"""

import hashlib
from collections import Counter

import numpy as np
import pytest

MIN_QUERIES, PER_CLUSTER = 3, 50
NUM_CLUSTERS = 200


@pytest.fixture(scope="module")
def filled(tmp_path_factory, made_store):
    """A pool of 200 clusters, and a set whose queries lie in them; sizes and counts lie around the limits."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([0, 1, 3, 49, 50, 51, 52, 100], NUM_CLUSTERS)
    counts = rng.choice([0, 1, 2, 3, 4, 5, 9], NUM_CLUSTERS)
    values = rng.normal(size=(NUM_CLUSTERS, 8))
    centroids = np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float16)
    made = made_store(tmp_path_factory.mktemp("paper"), centroids, {"flowers": {"mode": "cluster"}})
    for name, each, num_shards in (("web", sizes, 4), ("flowers", counts, 3)):
        cluster = np.array_split(rng.permutation(np.repeat(np.arange(NUM_CLUSTERS), each)), num_shards)
        made.add(name, [centroids[one] for one in cluster], cluster)
    return made, sizes, counts


def reference(made, cap: int) -> set[int]:
    """Ten lines: clusters with more than 3 queries, min(50, size) of each in a seeded order, the first of them all."""
    counts = Counter(made.cluster[one] for one in made.ids("flowers"))
    bytes_of = {one: hashlib.sha256(str(one).encode()).hexdigest() for one in made.ids("web")}
    drawn = sorted(bytes_of, key=lambda one: hashlib.sha256(f"0|{bytes_of[one]}".encode()).hexdigest())
    members: dict[int, list[int]] = {}
    for one in drawn:
        members.setdefault(made.cluster[one], []).append(one)
    chosen = {one for c, num in counts.items() if num > MIN_QUERIES for one in members.get(c, [])[:PER_CLUSTER]}
    return set([one for one in drawn if one in chosen][:cap])


@pytest.mark.parametrize("cap", [1, 1000, 100_000])
def test_the_run_selects_what_the_paper_says(filled, cap):
    made, sizes, counts = filled
    made.sets["flowers"] |= {"min_queries": MIN_QUERIES, "per_cluster": PER_CLUSTER, "cap": cap}
    made.run()
    wanted = reference(made, cap)
    selected = {row["image_id"]: row for row in made.rows("selection")}
    assert {one for one, row in selected.items() if row["keep"]} == wanted
    num_qualifying = int((counts > MIN_QUERIES).sum())
    num_held = int(np.minimum(sizes, PER_CLUSTER)[counts > MIN_QUERIES].sum())
    assert len(wanted) == min(num_held, cap)
    (told,) = made.rows("retrieval")
    assert told["num_clusters"] == num_qualifying
    assert told["num_nominal"] == num_qualifying * PER_CLUSTER
    assert told["num_final_nominal"] == min(num_qualifying * PER_CLUSTER, cap)
    assert (told["num_retrieved"], told["num_taken"]) == (num_held, min(num_held, cap))
    assert told["num_collisions"] == 0
    assert told["shortfall"] == num_qualifying * PER_CLUSTER - num_held
    assert told["num_short"] == int((sizes[counts > MIN_QUERIES] < PER_CLUSTER).sum())
    asked = {row["cluster"]: (row["num_queries"], row["num_pictures"], row["num_taken"]) for row in made.rows("quotas")}
    assert asked == {
        c: (counts[c], sizes[c], min(sizes[c], PER_CLUSTER)) for c in np.flatnonzero(counts > MIN_QUERIES).tolist()
    }
    reasons = {row["reason"] for one, row in selected.items() if one not in wanted}
    assert reasons == ({"not_retrieved", "over_cap"} if cap < num_held else {"not_retrieved"})
    stage = next(stage for stage in made.ledger.stages if stage.name == "quotas")
    (line,) = (line for line in stage.told(made.ledger) if "flowers" in line)
    assert line.split()[-2:] == [f"{num_qualifying * PER_CLUSTER:,}", f"{min(num_qualifying * PER_CLUSTER, cap):,}"]
