"""The order of samples: quotas, passes, mixing, and that a position says it all."""

import dataclasses
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from training.config import ConfigError, DataConfig, PartConfig
from training.data.index import Index, Part
from training.data.kinds.shard import Shard
from training.data.stream import SampleRef, Stream, shuffled


@dataclasses.dataclass
class Counted:
    """Shards that hold so many pictures; nothing here reads one."""

    shards: list[Shard]
    notes: list[str] = dataclasses.field(default_factory=list)


def counted(*sizes: int) -> Counted:
    return Counted([Shard(name=f"{n}", path="", num_samples=size, num_bytes=0) for n, size in enumerate(sizes)])


def stream(parts: dict[str, tuple[float, tuple[int, ...]]], *, seed: int = 0, **options: object) -> Stream:
    """A stream over parts of given weights and shard sizes."""
    total = sum(Fraction(weight) for weight, _ in parts.values())
    index = Index(
        tuple(Part(name=n, share=Fraction(w) / total, source=counted(*sizes)) for n, (w, sizes) in parts.items())
    )
    config = DataConfig(parts={"any": PartConfig(kind="folder", location="unused")}, **options)
    return Stream(index, config, seed=seed)


def places(refs: list[SampleRef]) -> list[tuple[int, int, int]]:
    return [(ref.part, ref.shard, ref.row) for ref in refs]


SIZES = (5, 1, 7, 3, 3, 9, 2)
EVERY = sorted((0, shard, row) for shard, size in enumerate(SIZES) for row in range(size))


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 7, 64])
def test_every_picture_comes_once_a_pass_and_passes_differ(shuffle_shards: int):
    order = stream({"a": (1, SIZES)}, shuffle_shards=shuffle_shards)
    num = len(EVERY)
    passes = [[order.locate(p) for p in range(e * num, (e + 1) * num)] for e in range(4)]
    for epoch, refs in enumerate(passes):
        assert sorted(places(refs)) == EVERY
        assert {ref.epoch for ref in refs} == {epoch}
    assert len({tuple(places(refs)) for refs in passes}) == 4


def test_only_the_shards_of_a_group_are_mixed_with_each_other():
    order = stream({"a": (1, (10,) * 12)}, shuffle_shards=5)  # groups of 4
    for group in range(6):
        shards = Counter(order.locate(p).shard for p in range(group * 40, (group + 1) * 40))
        assert list(shards.values()) == [10] * 4
    first = [order.locate(p).shard for p in range(40)]
    assert first != sorted(first, key=first.index)


def test_a_position_gives_the_same_picture_whatever_was_asked_before():
    options = {"shuffle_shards": 2}
    parts = {"a": (3, SIZES), "b": (1, (4, 4, 4)), "c": (0.5, (1,))}
    order = stream(parts, **options)
    for position in np.random.default_rng(0).permutation(5000)[:300].tolist():
        assert order.locate(position) == stream(parts, **options).locate(position)
    assert order.locate(10**12).epoch > 10**9


def test_seed_and_name_of_the_part_decide_the_order():
    def first(seed: int, name: str, before: tuple[str, ...] = ()) -> list[SampleRef]:
        parts = {name: (1.0, SIZES)}
        return [stream(parts, seed=seed).locate(p) for p in range(30)]

    assert first(0, "a") == first(0, "a")
    assert first(0, "a") != first(1, "a")
    assert first(0, "a") != first(0, "b")
    assert first(-1, "a") != first(1, "a")


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 1, 1), (998, 1.5, 0.5), (1, 10**4, 10)])
def test_quotas_are_exact_and_hold_in_every_block(weights: tuple[float, ...]):
    order = stream({f"{n}": (weight, (50, 50)) for n, weight in enumerate(weights)})
    shares = np.array(weights) / sum(weights)
    for block in (0, 1, 2, 3, 511, 1023, 1024, 5000):
        counts = np.bincount([order.locate(block * 1024 + slot).part for slot in range(1024)], minlength=3)
        assert (np.abs(counts - shares * 1024) < 1 + 1e-9).all()
    # All blocks of a round, from the table that locate() reads.
    totals = order._mix._counts.sum(axis=0)
    assert totals.sum() == 2**20
    assert (np.abs(totals - shares * 2**20) <= 1).all()
    assert (order._mix._counts >= 0).all()


def test_each_part_is_read_in_passes_of_its_own():
    order = stream({"a": (0.9, (30,)), "b": (0.1, (20, 5))}, shuffle_shards=1)
    refs = [order.locate(p) for p in range(6000)]
    for part, num in ((0, 30), (1, 25)):
        mine = [ref for ref in refs if ref.part == part]
        assert [ref.epoch for ref in mine] == [n // num for n in range(len(mine))]
        for epoch in range(len(mine) // num):
            assert len({(r.shard, r.row) for r in mine[epoch * num : (epoch + 1) * num]}) == num


def test_without_weights_every_picture_comes_about_once_in_as_many_positions_as_there_are_pictures():
    sizes = {"a": (700, 300), "b": (24,), "c": (3000, 70)}
    order = stream({name: (sum(size), size) for name, size in sizes.items()})
    seen = Counter(places([order.locate(p) for p in range(4094)]))
    assert set(seen.values()) <= {1, 2}
    assert len(seen) >= 4094 - 6  # an edge picture a part, for rounding


def test_homogeneous_batches_are_of_one_part_and_parts_have_their_share_of_batches():
    order = stream({"a": (0.75, SIZES), "b": (0.25, (40,))}, homogeneous=True, batch_size=8)
    batches = [[order.locate(p) for p in range(b * 8, b * 8 + 8)] for b in range(1024)]
    assert all(len({ref.part for ref in batch}) == 1 for batch in batches)
    assert Counter(batch[0].part for batch in batches) == {0: 768, 1: 256}
    mine = [ref for batch in batches for ref in batch if ref.part == 0]
    assert sorted(places(mine[:30])) == EVERY
    assert sorted(places(mine[30:60])) == EVERY


def test_a_replacement_follows_from_position_and_attempt_and_is_of_the_same_part():
    order = stream({"a": (0.5, SIZES), "b": (0.5, (40,))})
    for position in range(50):
        drawn = [order.locate(position, attempt) for attempt in range(1, 40)]
        assert {ref.part for ref in drawn} == {order.locate(position).part}
        assert len(set(drawn)) > 10
        again = stream({"a": (0.5, SIZES), "b": (0.5, (40,))})
        assert [again.locate(position, attempt) for attempt in range(1, 40)] == drawn
    shards = Counter(order.locate(p, a).shard for p in range(400) for a in range(1, 4) if order.locate(p).part == 0)
    assert shards[5] > shards[1] > 0


def test_a_share_that_would_never_come_is_refused():
    with pytest.raises(ConfigError, match=r"data\.parts\.b: its share is 1\.0e-07; below one in a million"):
        stream({"a": (1, SIZES), "b": (1e-7, (4,))})


def test_memory_is_that_of_groups_and_not_of_the_set():
    order = stream({"a": (1, (10_000,) * 2000)}, shuffle_shards=4)  # 20 million pictures
    for position in range(0, 20_000_000, 250_000):
        order.locate(position)
    kept = order._group.cache_info()
    assert kept.currsize == kept.maxsize == 4  # of 40,000 pictures each


def test_permutations_stay_as_they_are():
    """A resume after an update of numpy meets the order it left."""
    assert shuffled(10, 1, 2).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
    assert sorted(shuffled(1000, 3).tolist()) == list(range(1000))
    order = stream({"a": (3, SIZES), "b": (1, (4, 4, 4))}, shuffle_shards=2, seed=5)
    assert [tuple(order.locate(p)) for p in (0, 1, 2, 1000, 123_456_789)] == [
        (1, 0, 0, 0),
        (0, 5, 7, 0),
        (1, 2, 3, 0),
        (1, 2, 2, 20),
        (0, 3, 2, 3086419),
    ]
