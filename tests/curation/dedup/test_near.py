"""From hashes to near pairs: the shuffle by key range, and that no cut of the work shows in what it makes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from curation.dedup.near import NearConfig, NearPairs, hamming, near_pairs
from curation.dedup.near_codes import NearCodes, rows_by_range
from curation.schema import groups_by_size, image_ids
from training.config import ConfigError

SHARDS = [0, 1, 2, 1_000_000]


def pictures(seed: int, num: int) -> np.ndarray:
    """Codes of which many are equal or near."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 2**64, 1 + num // 6, dtype=np.uint64)[draw.integers(0, 1 + num // 6, num)]
    for bit in draw.integers(0, 64, (5, num)):
        codes = np.where(draw.random(num) < 0.4, codes ^ (np.uint64(1) << bit.astype(np.uint64)), codes)
    return codes


def pool(io: Any, codes: np.ndarray, cuts: list[int], **columns: np.ndarray) -> np.ndarray:
    """Pictures in four shards, cut at three places; all are safe. Their ids."""
    ids = []
    for shard, rows in zip(SHARDS, np.split(np.arange(len(codes)), sorted(cuts)), strict=True):
        ids.append(image_ids(shard, len(rows)))
        names = [str(row) for row in rows]
        more = {name: values[rows] for name, values in columns.items()}
        io.roles[shard] = "pool"
        io.put("hashes", shard, **{"image_id": ids[-1], "sha256": names, "phash": codes[rows], **more})
        io.put("safety", shard, image_id=ids[-1])
        io.keep("safety", shard, ids[-1], names)
    return np.concatenate(ids)


def pairs_of(io: Any, config: NearConfig) -> set[tuple[int, int, int]]:
    """Run both stages; the pairs of all parts."""
    NearCodes(config).run(io, io.map)
    NearPairs(config).run(io, io.map)
    rows = [row for part in io.parts("near_pairs") for row in io.tables[part].to_pylist()]
    found = {tuple(row.values()) for row in rows}
    assert len(found) == len(rows), "each pair once over all parts"
    return found


@settings(max_examples=25)
@given(
    st.integers(0, 100),
    st.integers(0, 80),
    st.lists(st.integers(0, 80), min_size=3, max_size=3),
    st.integers(0, 8),
    st.sampled_from([1, 2, 3, 40]),
    st.sampled_from([2, 5, 1024]),
    st.sampled_from([1, 40, 10**6]),
)
def test_a_pair_is_found_however_the_work_is_cut(
    new_io, seed, num, cuts, radius, key_ranges, max_bucket, rows_in_group
) -> None:
    """Over shards, groups of shards, key ranges and caps; against all pairs at once."""
    codes = pictures(seed, num)
    io = new_io()
    ids = pool(io, codes, cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curation.dedup.near_codes._ROWS_IN_GROUP", rows_in_group * min(15, key_ranges))
        config = NearConfig(radius_bits=radius, key_ranges=key_ranges, max_bucket=max_bucket)
        found = pairs_of(io, config)
    a, b, distance, _ = near_pairs(codes, ids, radius_bits=radius)
    assert found == set(zip(a.tolist(), b.tolist(), distance.tolist(), strict=True))
    low, high = np.nonzero(np.triu(hamming(codes[:, None], codes[None]) <= radius, 1))
    least = {code: min(ids[codes == code]) for code in set(codes.tolist())}
    slow = {tuple(sorted((least[codes[i]], least[codes[j]]))) for i, j in zip(low, high, strict=True)}
    assert {pair[:2] for pair in found if pair[2]} == {pair for pair in slow if pair[0] != pair[1]}


def test_order_of_shards_and_memory_change_no_byte(memory_io: Any) -> None:
    io = memory_io
    pool(io, pictures(5, 3000), [700, 1500, 1501])
    config = NearConfig(radius_bits=2, key_ranges=3, max_bucket=4)

    def made(io: Any) -> list[Any]:
        pairs_of(io, config)
        return [io.tables[part] for name in ("near_pairs", "near_report") for part in io.parts(name)]

    before = made(io)
    assert sum(table.num_rows for table in before[:3]) > 1000
    small = replace(io, memory_bytes=200_000)  # 781 codes, 2,083 pairs: several passes over the keys
    assert made(small) == before
    io.kept_ids = dict(reversed(io.kept_ids.items()))
    io.tables = dict(reversed(io.tables.items()))
    assert made(io) == before


def test_pairs_that_do_not_fit_are_told(memory_io: Any) -> None:
    pool(memory_io, pictures(5, 3000), [700, 1500, 1501])
    config = NearConfig(radius_bits=6, key_ranges=1)
    with pytest.raises(
        ConfigError, match=r"near.radius_bits: more than \d+ pairs within 6 bits in one of 1 key ranges"
    ):
        pairs_of(replace(memory_io, memory_bytes=10_000), config)


def test_a_task_needs_the_rows_of_its_range_only() -> None:
    codes = pictures(2, 500)
    ranges, rows = rows_by_range(codes, radius_bits=4, key_ranges=16)
    assert (np.diff(ranges * 1000 + rows) > 0).all(), "sorted, each once"
    pairs = [near_pairs(codes, np.arange(500), radius_bits=4, key_ranges=16, key_range=n)[:3] for n in range(16)]
    for key_range, whole in enumerate(pairs):
        mine = rows[ranges == key_range]
        got = near_pairs(codes[mine], mine, radius_bits=4, key_ranges=16, key_range=key_range)[:3]
        for one, two in zip(got, whole, strict=True):
            np.testing.assert_array_equal(one, two)
    repeated, _ = rows_by_range(np.zeros(500, np.uint64), radius_bits=4, key_ranges=16)
    assert len(repeated) < 500 + 15, "a repeated code is compared once a range"


def test_the_report_counts_codes_buckets_and_pairs(memory_io: Any) -> None:
    io = memory_io
    pool(io, np.array([0, 1, 3, 2**40, 0], np.uint64), [1, 2, 3])
    config = NearConfig(radius_bits=1, key_ranges=1, max_bucket=2)
    found = pairs_of(io, config)
    assert len(found) == 4  # 0-1, 1-3, 0-2**40, and the chain
    report = io.tables[io.part("near_report", 0)].to_pylist()
    assert [row["key"] for row in report] == [0, 1, 2]
    assert [row["num_codes"] for row in report] == [4] * 3
    # Blocks of 21, 22 and 21 bits: the low two, the outer two, the upper two.
    assert [row["num_buckets"] for row in report] == [4, 3, 2]
    assert [row["largest_bucket"] for row in report] == [1, 2, 3]
    assert [row["num_rerouted"] for row in report] == [0, 0, 3]
    assert sum(row["num_pairs"] for row in report) == 3
    (line,) = NearPairs(config).told(io)
    assert line.startswith("near_pairs: buckets of more than 2 codes, 3 codes over all keys and 3 in the largest, were")
    pairs_of(io, NearConfig(radius_bits=1, key_ranges=1))
    assert not list(NearPairs(NearConfig(radius_bits=1, key_ranges=1)).told(io))


def test_another_hash_is_compared_and_blocked_hashes_stay_phashes(memory_io: Any) -> None:
    phash = np.array([0, 2**63, 2**62, 2**61], np.uint64)
    dhash = np.array([7, 7, 7, 2**50], np.uint64)
    io = memory_io
    ids = pool(io, phash, [1, 2, 3], dhash=dhash)
    assert len(pairs_of(io, NearConfig(radius_bits=0))) == 0
    config = NearConfig(radius_bits=0, hash="dhash")
    assert pairs_of(io, config) == {(ids[0], ids[1], 0), (ids[1], ids[2], 0)}
    blocked = NearConfig(radius_bits=0, hash="dhash", blocked_hashes=(f"{2**63:016x}", "0000000000000007"))
    assert pairs_of(io, blocked) == {(ids[0], ids[2], 0)}


def test_the_cap_makes_only_pairs_stale() -> None:
    one, two = NearConfig(max_bucket=2), NearConfig(max_bucket=3)
    assert NearCodes(one).fingerprint_values() == NearCodes(two).fingerprint_values()
    assert NearPairs(one).fingerprint_values() != NearPairs(two).fingerprint_values()


def test_groups_of_shards() -> None:
    assert list(groups_by_size([(0, 5), (1, 5), (2, 1), (3, 20), (4, 0)], 10)) == [[0, 1], [2], [3], [4]]
    assert list(groups_by_size([], 10)) == []


def test_blocked_hashes_are_checked() -> None:
    with pytest.raises(ValidationError, match="got 'xyz', allowed are pHashes of 16 hex digits"):
        NearConfig(blocked_hashes=("xyz",))
    assert NearConfig(blocked_hashes=("FF00FF00FF00FF00",)).blocked_hashes == ("ff00ff00ff00ff00",)


def test_hamming() -> None:
    a = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert hamming(a, np.uint64(0)).tolist() == [0, 1, 1, 64]
    distances = hamming(a[:, None], a[None])
    assert distances.shape == (4, 4)
    assert distances.dtype == np.int16
    assert np.array_equal(distances, distances.T)
    assert distances[1, 2] == 2
