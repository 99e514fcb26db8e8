"""Pairs within a Hamming radius: exact against all pairs, whatever the cut into ranges."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from curation.dedup.groups import connected_components
from curation.dedup.near import NearConfig, hamming, key_masks, near_pairs, range_of


def codes_with_near_ones(seed: int, num: int) -> np.ndarray:
    """Random codes, flips of them by 0 to 9 bits, and some equal ones."""
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 2**63, num, dtype=np.uint64) * np.uint64(2)
    codes = base.copy()
    for i in range(num):
        for bit in draw.integers(0, 64, draw.integers(0, 10)):
            codes[i] ^= np.uint64(1) << np.uint64(bit)
    return np.concatenate([base, codes, base[: num // 3], np.zeros(3, np.uint64)])


def all_pairs(codes: np.ndarray, ids: np.ndarray, radius: int) -> dict[tuple[int, int], int]:
    """Slow twin."""
    found = {}
    for i, j in itertools.combinations(range(len(codes)), 2):
        distance = int(codes[i] ^ codes[j]).bit_count()
        if distance <= radius:
            a, b = sorted((int(ids[i]), int(ids[j])))
            found[a, b] = distance
    return found


@pytest.mark.parametrize("radius", [0, 1, 4, 6, 8])
@pytest.mark.parametrize("key_ranges", [1, 5])
def test_pairs_equal_all_pairs_of_distinct_codes(radius: int, key_ranges: int) -> None:
    codes = codes_with_near_ones(radius, 60)
    ids = np.random.default_rng(1).permutation(10 * len(codes))[: len(codes)].astype(np.int64)
    slow = all_pairs(codes, ids, radius)
    got: dict[tuple[int, int], int] = {}
    for key_range in range(key_ranges):
        a, b, bits = near_pairs(codes, ids, radius_bits=radius, key_ranges=key_ranges, key_range=key_range)
        assert (a < b).all()
        for pair in zip(a.tolist(), b.tolist(), bits.tolist(), strict=True):
            assert pair[:2] not in got, "each pair once over all ranges"
            got[pair[0], pair[1]] = pair[2]
    assert all(slow[pair] == bits for pair, bits in got.items())
    # Equal codes are chained; every pair of distinct codes stands between their least ids.
    least = {int(code): int(ids[codes == code].min()) for code in np.unique(codes)}
    code_of = dict(zip(ids.tolist(), codes.tolist(), strict=True))
    expected = {pair for pair, bits in slow.items() if bits and all(least[code_of[x]] == x for x in pair)}
    assert {pair for pair, bits in got.items() if bits} == expected
    # The same components as all pairs.
    order = np.sort(ids)

    def components(pairs: dict[tuple[int, int], int]) -> list[int]:
        ends = np.searchsorted(order, np.array(list(pairs)).reshape(-1, 2))
        return connected_components(len(order), ends[:, 0], ends[:, 1]).tolist()

    assert components(got) == components(slow)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(0, 9), st.integers(1, 4), st.randoms())
def test_order_of_rows_changes_nothing(codes: list[int], radius: int, key_ranges: int, draw) -> None:
    values = np.array(codes + codes[:3], np.uint64)
    ids = np.arange(len(values), dtype=np.int64)
    shuffled = np.array(draw.sample(range(len(values)), len(values)), np.int64)
    for key_range in range(key_ranges):
        options = {"radius_bits": radius, "key_ranges": key_ranges, "key_range": key_range}
        one = near_pairs(values, ids, **options)
        two = near_pairs(values[shuffled], ids[shuffled], **options)
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("radius", [0, 3, 8, 16])
def test_two_codes_within_the_radius_share_a_key(radius: int) -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        flips = 0
        for bit in draw.choice(64, radius, replace=False):
            flips |= 1 << int(bit)
        assert any(flips & mask == 0 for mask in key_masks(radius))


def test_a_full_bucket_stays_exact() -> None:
    """A thousand codes that share all but the last 16 bits."""
    codes = np.unique(np.random.default_rng(0).integers(0, 2**16, 1000, dtype=np.uint64))
    a, b, bits = near_pairs(codes, np.arange(len(codes)), radius_bits=2)
    distance = hamming(codes[:, None], codes[None])
    i, j = np.nonzero(np.triu(distance <= 2, 1))
    np.testing.assert_array_equal(np.stack([a, b]), np.stack([i, j]))
    np.testing.assert_array_equal(bits, distance[i, j])


def test_ranges_are_even() -> None:
    keys = np.arange(0, 80_000, dtype=np.uint64) << np.uint64(40)
    counts = np.bincount(range_of(keys, 8), minlength=8)
    assert counts.min() > 9_000


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
