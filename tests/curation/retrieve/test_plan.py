"""Nominal counts against rows of table 15 of the paper (Oquab et al. 2023)."""

import pytest

from curation.retrieve.plan import is_possible, nominal_as_is, nominal_cluster, nominal_sample


@pytest.mark.parametrize(
    ("nominal", "retrieved", "final"),
    [
        (nominal_as_is(14_197_086), None, 14_197_086),  # ImageNet-22k
        (nominal_sample(14_197_086, 4), 56_788_344, 56_788_344),
        (nominal_sample(1_281_167, 32), 40_997_344, 40_997_344),  # ImageNet-1k
        (nominal_sample(1_580_470, 4), 6_321_880, 6_321_880),  # Google Landmarks v2
        (nominal_cluster(263), 2_630_000, 1_000_000),  # Caltech 101
        (nominal_cluster(101), 1_010_000, 1_000_000),  # VOC 2007
        (nominal_cluster(96), 960_000, 960_000),  # AmsterTime new
        (nominal_cluster(83), 830_000, 830_000),  # AmsterTime old
        (nominal_cluster(6286), 62_860_000, 1_000_000),  # Met
    ],
)
def test_rows_of_the_paper(nominal, retrieved, final):
    assert nominal == (retrieved, final)


def test_a_row_of_the_paper_that_cannot_be():
    assert is_possible(3030, 263)
    assert not is_possible(1464, 1014)  # VOC 2012 trainaug, as printed
    assert is_possible(10_582, 1014)
