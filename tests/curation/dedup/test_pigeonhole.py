"""Pairs within a Hamming radius: exact against all pairs, whatever the cut into ranges, keys and buckets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.dedup.near import hamming, near_pairs
from curation.dedup.pigeonhole import (
    BLOCKS_IN_KEY,
    BLOCKS_IN_SUBKEY,
    HASH_BITS,
    TooManyPairsError,
    _Join,
    find_pairs,
    keys_of,
    range_of,
)
from curation.dedup.unionfind import connected_components


def flipped(codes: np.ndarray, num_flips: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Codes with so many bits of each flipped."""
    order = np.argsort(draw.random((len(codes), 64)), axis=1).astype(np.uint64)
    flips = np.where(np.arange(64) < num_flips[:, None], np.uint64(1) << order, np.uint64(0))
    return codes ^ np.bitwise_xor.reduce(flips, axis=1)


def some_codes(kind: str, seed: int, num: int) -> np.ndarray:
    """Random codes with near ones; clusters around a few bases; codes of which only some bits vary. Some are equal."""
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 2**64, num, dtype=np.uint64)
    if kind == "clustered":
        base = base[draw.integers(0, 3, num)]
    if kind == "narrow":
        base &= np.uint64(int("1000110000" * 6, 2))
    codes = flipped(base, draw.integers(0, 10, num), draw)
    return np.concatenate([base[: num // 2], codes, codes[: num // 3], np.zeros(3, np.uint64)])


def all_pairs(codes: np.ndarray, ids: np.ndarray, radius: int) -> dict[tuple[int, int], int]:
    """Slow twin."""
    found = {}
    for i, j in itertools.combinations(range(len(codes)), 2):
        distance = int(codes[i] ^ codes[j]).bit_count()
        if distance <= radius:
            a, b = sorted((int(ids[i]), int(ids[j])))
            found[a, b] = distance
    return found


def over_all_ranges(codes: np.ndarray, ids: np.ndarray, *, key_ranges: int, **options) -> dict[tuple[int, int], int]:
    """Pairs of all ranges; each may come once."""
    got: dict[tuple[int, int], int] = {}
    for key_range in range(key_ranges):
        a, b, bits, _ = near_pairs(codes, ids, key_ranges=key_ranges, key_range=key_range, **options)
        assert (a < b).all()
        for pair in zip(a.tolist(), b.tolist(), bits.tolist(), strict=True):
            assert pair[:2] not in got, "each pair once over all ranges"
            got[pair[0], pair[1]] = pair[2]
    return got


@pytest.mark.parametrize("kind", ["random", "clustered", "narrow"])
@pytest.mark.parametrize("radius", [0, 1, 2, 4, 5, 8])
@pytest.mark.parametrize(("key_ranges", "max_bucket"), [(1, 2), (1, 1024), (5, 2), (5, 8)])
def test_pairs_equal_all_pairs_of_distinct_codes(kind: str, radius: int, key_ranges: int, max_bucket: int) -> None:
    codes = some_codes(kind, radius, 60)
    ids = np.random.default_rng(1).permutation(10 * len(codes))[: len(codes)].astype(np.int64)
    slow = all_pairs(codes, ids, radius)
    got = over_all_ranges(codes, ids, radius_bits=radius, key_ranges=key_ranges, max_bucket=max_bucket)
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


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=7)), max_size=40),
    st.integers(0, 16),
    st.integers(2, 6),
)
def test_cap_changes_no_pair(drawn, radius, max_bucket) -> None:
    """Clusters around four bases, buckets cut down to a few codes."""
    bases = np.random.default_rng(0).integers(0, 2**64, 4, dtype=np.uint64)
    flips = [sum(1 << bit for bit in bits) for _, bits in drawn]
    codes = bases[[base for base, _ in drawn] or np.empty(0, int)] ^ np.array(flips, np.uint64)
    capped = find_pairs(codes, radius_bits=radius, max_bucket=max_bucket)
    whole = find_pairs(codes, radius_bits=radius, max_bucket=10**6)
    np.testing.assert_array_equal(capped.pairs, whole.pairs)
    assert [key.num_pairs for key in capped.keys] == [key.num_pairs for key in whole.keys]
    assert [key.largest_bucket for key in capped.keys] == [key.largest_bucket for key in whole.keys]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(0, 9), st.integers(1, 4), st.randoms())
def test_order_of_rows_changes_nothing(codes: list[int], radius: int, key_ranges: int, draw) -> None:
    values = np.array(codes + codes[:3], np.uint64)
    ids = np.arange(len(values), dtype=np.int64)
    shuffled = np.array(draw.sample(range(len(values)), len(values)), np.int64)
    for key_range in range(key_ranges):
        options = {"radius_bits": radius, "key_ranges": key_ranges, "key_range": key_range}
        one = near_pairs(values, ids, **options)
        two = near_pairs(values[shuffled], ids[shuffled], **options)
        for left, right in zip(one[:3], two[:3], strict=True):
            np.testing.assert_array_equal(left, right)
        assert one[3] == two[3]


@pytest.mark.parametrize("radius", [0, 3, 8, 16])
@pytest.mark.parametrize("width", [64, 43, 17])
@pytest.mark.parametrize("blocks", [BLOCKS_IN_KEY, BLOCKS_IN_SUBKEY])
def test_two_codes_within_the_radius_share_a_key(radius: int, width: int, blocks: int) -> None:
    if radius + blocks > width:
        pytest.skip("blocks would be empty")
    draw = np.random.default_rng(0)
    keys = keys_of(width, radius, blocks)
    for _ in range(200):
        flips = sum(1 << int(bit) for bit in draw.choice(width, radius, replace=False))
        agreed = [flips & key.mask == 0 for key in keys]
        firsts = [same and all(flips & mask for mask in key.differ) for same, key in zip(agreed, keys, strict=True)]
        assert firsts.index(True) == agreed.index(True)
        assert sum(firsts) == 1


@pytest.mark.parametrize(("width", "blocks"), [(64, BLOCKS_IN_KEY), (43, BLOCKS_IN_SUBKEY)])
def test_a_key_is_written_first_and_back_again(width: int, blocks: int) -> None:
    from curation.dedup.bitloops import moved

    codes = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    for key in keys_of(width, 4, blocks):
        out, back = np.empty_like(codes), np.empty_like(codes)
        moved(codes, key.moves, out)
        np.testing.assert_array_equal(
            out >> np.uint64(width - 1) >> np.uint64(1), codes >> np.uint64(width - 1) >> np.uint64(1)
        )
        np.testing.assert_array_equal(np.bitwise_count(out), np.bitwise_count(codes))
        one = np.array([key.mask], np.uint64)
        moved(one, key.moves, one)
        assert int(one[0]) == ((1 << key.num_bits) - 1) << (width - key.num_bits)
        moved(out, np.ascontiguousarray(key.moves[:, ::-1]), back)
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("max_bucket", [2, 64, 10**6])
def test_a_full_bucket_stays_exact(max_bucket: int) -> None:
    """A thousand codes that share all but the last 16 bits."""
    codes = np.unique(np.random.default_rng(0).integers(0, 2**16, 1000, dtype=np.uint64))
    a, b, bits, report = near_pairs(codes, np.arange(len(codes)), radius_bits=2, max_bucket=max_bucket)
    distance = hamming(codes[:, None], codes[None])
    i, j = np.nonzero(np.triu(distance <= 2, 1))
    np.testing.assert_array_equal(np.stack([a, b]), np.stack([i, j]))
    np.testing.assert_array_equal(bits, distance[i, j])
    assert max(key.largest_bucket for key in report) == len(codes)
    assert sum(key.num_pairs for key in report) == len(a)
    assert any(key.num_rerouted for key in report) == (max_bucket < len(codes))


def test_a_dense_cluster_is_not_cut_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """All codes within two bits of one: whatever the cut, most stay together."""
    flips = np.concatenate([[0], np.uint64(1) << np.arange(64, dtype=np.uint64)]).astype(np.uint64)
    codes = np.unique(flips[:, None] ^ flips)
    num_cuts = 0
    by_key = _Join.by_key

    def counted(*arguments) -> None:
        nonlocal num_cuts
        num_cuts += 1
        by_key(*arguments)

    monkeypatch.setattr(_Join, "by_key", counted)
    found = find_pairs(codes, radius_bits=8, max_bucket=16)
    assert len(found.pairs) == len(codes) * (len(codes) - 1) // 2
    assert num_cuts == len(found.keys)
    assert all(key.num_rerouted for key in found.keys)


def test_hits_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = some_codes("clustered", 3, 300)
    whole = find_pairs(codes, radius_bits=8, max_bucket=1024)
    monkeypatch.setattr("curation.dedup.pigeonhole._HITS", 1)
    np.testing.assert_array_equal(find_pairs(codes, radius_bits=8, max_bucket=1024).pairs, whole.pairs)


def test_more_pairs_than_allowed() -> None:
    codes = np.arange(64, dtype=np.uint64)
    num = len(find_pairs(codes, radius_bits=2, max_bucket=1024).pairs)
    assert len(find_pairs(codes, radius_bits=2, max_bucket=1024, most_pairs=num).pairs) == num
    with pytest.raises(TooManyPairsError):
        find_pairs(codes, radius_bits=2, max_bucket=1024, most_pairs=num - 1)


def test_nothing_and_one() -> None:
    for num in (0, 1):
        found = find_pairs(np.zeros(num, np.uint64), radius_bits=4, max_bucket=2)
        assert (len(found.pairs), found.num_equal, len(found.keys)) == (0, 0, 15)


def test_ranges_are_even_and_the_same_compiled() -> None:
    from curation.dedup.bitloops import of_range

    keys = np.arange(0, 80_000, dtype=np.uint64) << np.uint64(40)
    counts = np.bincount(range_of(keys, 8), minlength=8)
    assert counts.min() > 9_000
    out = np.empty(len(keys) + 1, np.uint64)
    mask = np.uint64(2**HASH_BITS - 1)
    compiled = [of_range(keys, mask, np.uint64(8), np.uint64(key_range), out) for key_range in range(8)]
    assert compiled == counts.tolist()
