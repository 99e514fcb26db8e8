"""Nominal counts against all rows of table 15 of the paper (Oquab et al. 2023), and through the recipe of them."""

import re

import pytest

from curation.ingest.sources import QueryConfig
from curation.retrieve.plan import (
    Nominal,
    format_plan,
    is_possible,
    nominal_as_is,
    nominal_balanced,
    nominal_cluster,
    nominal_sample,
    planned,
)
from pipelines.curate import CurateRecipe
from pipelines.recipe import find_recipe, load_recipe

TOTAL = 142_109_386
# Name in lvd142m.yaml: images, mode, k or clusters that hold more than 3 of them, retrieved, final. The clusters are
# retrieved / 10,000, which the paper does not print.
TABLE_15 = {
    "imagenet22k_as_is": (14_197_086, "as_is", None, None, 14_197_086),
    "imagenet22k": (14_197_086, "sample", 4, 56_788_344, 56_788_344),
    "imagenet1k": (1_281_167, "sample", 32, 40_997_344, 40_997_344),
    "caltech101": (3_030, "cluster", 263, 2_630_000, 1_000_000),
    "cub200": (5_994, "cluster", 130, 1_300_000, 1_000_000),
    "dtd": (1_880, "cluster", 158, 1_580_000, 1_000_000),
    "aircraft": (3_334, "cluster", 117, 1_170_000, 1_000_000),
    "flowers102": (1_020, "cluster", 106, 1_060_000, 1_000_000),
    "food101": (75_750, "cluster", 2167, 21_670_000, 1_000_000),
    "pets": (3_680, "cluster", 275, 2_750_000, 1_000_000),
    "cars": (8_144, "cluster", 722, 7_220_000, 1_000_000),
    "sun397": (19_850, "cluster", 1895, 18_950_000, 1_000_000),
    "voc2007": (2_501, "cluster", 101, 1_010_000, 1_000_000),
    "ade20k": (20_210, "cluster", 2072, 20_720_000, 1_000_000),
    "cityscapes": (2_975, "cluster", 139, 1_390_000, 1_000_000),
    "voc2012": (1_464, "cluster", 1014, 10_140_000, 1_000_000),
    "mapillary": (1_434_262, "as_is", None, None, 1_434_262),
    "kitti": (23_158, "cluster", 370, 3_700_000, 1_000_000),
    "nyud": (24_231, "cluster", 1085, 10_850_000, 1_000_000),
    "sunrgbd": (4_829, "cluster", 487, 4_870_000, 1_000_000),
    "landmarks_as_is": (1_580_470, "as_is", None, None, 1_580_470),
    "landmarks": (1_580_470, "sample", 4, 6_321_880, 6_321_880),
    "amstertime_new": (1_231, "cluster", 96, 960_000, 960_000),
    "amstertime_old": (1_231, "cluster", 83, 830_000, 830_000),
    "met": (397_121, "cluster", 6286, 62_860_000, 1_000_000),
    "oxford": (4_993, "cluster", 368, 3_680_000, 1_000_000),
    "paris": (6_322, "cluster", 366, 3_660_000, 1_000_000),
}
IMAGES = {name: row[0] for name, row in TABLE_15.items()}
QUALIFYING = {name: row[2] for name, row in TABLE_15.items() if row[1] == "cluster"}


@pytest.mark.parametrize("name", TABLE_15)
def test_rows_of_the_paper(name):
    images, mode, number, retrieved, final = TABLE_15[name]
    nominal = {
        "as_is": lambda: nominal_as_is(images),
        "sample": lambda: nominal_sample(images, number),
        "cluster": lambda: nominal_cluster(number),
    }[mode]()
    assert nominal == (retrieved, final)


def test_the_rows_are_27_and_add_up_to_the_paper_s_total():
    assert len(TABLE_15) == 27
    assert sum(row[4] for row in TABLE_15.values()) == TOTAL


def test_one_row_of_the_paper_cannot_be():
    impossible = {name for name, num in QUALIFYING.items() if not is_possible(IMAGES[name], num)}
    assert impossible == {"voc2012"}  # trainaug has 10,582 images, of which the paper prints 1,464
    assert is_possible(10_582, QUALIFYING["voc2012"])


def test_the_recipe_asks_for_what_the_paper_prints():
    recipe = load_recipe(CurateRecipe, "lvd142m")
    rows = planned(recipe.queries, images=IMAGES, qualifying=QUALIFYING, num_clusters=recipe.cluster.num_clusters)
    assert [row.query_set for row in rows] == list(TABLE_15)
    assert {row.query_set: (row.mode, row.nominal) for row in rows} == {
        name: (mode, Nominal(retrieved, final)) for name, (_, mode, _, retrieved, final) in TABLE_15.items()
    }
    assert sum(row.nominal.final for row in rows) == TOTAL
    assert {row.query_set: row.problem for row in rows if row.problem} == {
        "voc2012": "1,014 clusters cannot hold 4 of 1,464 images each"
    }
    text = list(format_plan(rows))
    assert text[-2].split() == ["total", f"{TOTAL:,}"]
    assert text[-1] == "  voc2012: impossible: 1,014 clusters cannot hold 4 of 1,464 images each"


def test_the_comments_of_the_recipe_say_the_same():
    said = {}
    for line in find_recipe("lvd142m").read_text().splitlines():
        found = re.match(r"  (\w+): \{.*mode: .*# .*: ([\d,]+) -> ([\d,]+)$", line)
        if found:
            said[found[1]] = tuple(int(number.replace(",", "")) for number in found.groups()[1:])
    assert said == {name: (row[0], row[4]) for name, row in TABLE_15.items()}


# Before anything is known


def test_without_images_only_what_is_asked_is_told():
    recipe = load_recipe(CurateRecipe, "lvd142m")
    rows = planned(recipe.queries, images={})
    assert {row.nominal for row in rows} == {None}
    text = list(format_plan(rows))
    assert len(text) == 28  # no total
    assert text[1].split() == ["imagenet22k_as_is", "as_is", "its", "images", "themselves"]
    assert "10,000 of each cluster with more than 3 images, at most 1,000,000" in text[4]


def test_before_clustering_the_counts_are_bounds():
    sets = {"few": QueryConfig(location="a", kind="folder", mode="cluster", per_cluster=10, cap=25)}
    (row,) = planned(sets, images={"few": 11}, num_clusters=100)
    assert (row.nominal, row.at_most, row.problem) == (Nominal(20, 20), True, None)
    (row,) = planned(sets, images={"few": 400}, num_clusters=5)
    assert row.nominal == Nominal(50, 25)
    assert list(format_plan([row]))[-1].split() == ["total", "≤", "25"]
    (row,) = planned(sets, images={"few": 400}, num_clusters=5, qualifying={"few": 1})
    assert (row.nominal, row.at_most) == (Nominal(10, 10), False)


def test_what_cannot_be_is_told_before_work():
    folder = {"location": "a", "kind": "folder"}
    sets = {
        "few": QueryConfig(**folder, mode="cluster"),
        "many": QueryConfig(**folder, k=900),
        "all": QueryConfig(mode="balanced", total=901),
    }
    rows = planned(sets, images={"few": 3, "many": 5}, num_pool=800)
    assert [row.problem for row in rows] == [
        "no cluster can hold 4 of 3 images",
        "asks for 900 neighbours of a pool of at most 800",
        "asks for 901 of a pool of at most 800",
    ]
    assert rows[2].nominal == nominal_balanced(901) == (901, 901)
    assert not any(row.problem for row in planned(sets, images={"few": 4, "many": 5}, num_pool=901))
