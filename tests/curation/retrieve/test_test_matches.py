"""Pictures of sets that are taken as they are and that match a benchmark: left out, counted, and queries as before."""

from curation.schema import image_ids

TEST_PICTURE = 7_000_000 * 1_000_000


def matched(made) -> list[int]:
    """Three pictures of the set owned match: two leak, one is below the threshold; the last one is in another shard."""
    first, second = made.shards["owned"]
    ids = [*image_ids(first, 3).tolist(), int(image_ids(second, 1)[0])]
    rows = [(ids[0], 0.99, None), (ids[1], 0.05, None), (ids[2], 0.99, False), (ids[3], 0.05, True)]
    made.edges = [
        {"image_id": one, "reference_id": TEST_PICTURE + n, "similarity": similarity, "verified": verified}
        for n, (one, similarity, verified) in enumerate(rows)
    ]
    return [ids[0], ids[3]]


def test_they_are_dropped_for_the_benchmark_and_counted(made):
    leaking = matched(made)
    made.run()
    own = [row for row in made.rows("selection") if row["image_id"] in set(made.ids("owned"))]
    dropped = [row for row in own if not row["keep"]]
    assert [row["image_id"] for row in dropped] == leaking
    assert {row["reason"] for row in dropped} == {"test_match"}
    assert [row["reference_id"] for row in dropped] == [TEST_PICTURE, TEST_PICTURE + 3]
    assert all(row["part"] is None and row["threshold"] is not None for row in dropped)
    told = {row["image_id"]: row["score"] for row in own if row["score"] is not None}
    assert len(told) == 4  # those that stay tell what they touch, too
    samples = [row["image_id"] for row in made.rows("choices") if row["part"] == "owned"]
    assert samples == [one for one in made.ids("owned") if one not in leaking]
    (row,) = (row for row in made.rows("retrieval") if row["query_set"] == "owned")
    assert (row["num_queries"], row["num_test_matches"]) == (24, 2)
    assert [row["num_test_matches"] for row in made.rows("retrieval") if row["query_set"] != "owned"] == [None] * 3


def test_they_stay_queries_and_the_rest_of_the_run_stands(made):
    made.run()
    before = {name: made.digests(name) for name in ("queries", "neighbours", "offers")}
    matched(made)
    costs = made.run().costs
    assert set(costs) == {"leaks", "neighbours", "selection"}
    assert costs["neighbours"].num_jobs == 1  # the count of the set
    assert {name: made.digests(name) for name in before} == before


def test_the_set_may_be_taken_whole(made):
    matched(made)
    made.sets["owned"]["drop_test_matches"] = False
    made.run()
    own = [row for row in made.rows("selection") if row["image_id"] in set(made.ids("owned"))]
    assert all(row["keep"] and row["score"] is None and row["reference_id"] is None for row in own)
    (row,) = (row for row in made.rows("retrieval") if row["query_set"] == "owned")
    assert row["num_test_matches"] == 0
