"""Statistics against published or hand-computed values, and by simulation: coverage, and how often a true null is rejected."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from programmable_kv.lab.statistics.intervals import clopper_pearson, cluster_interval
from programmable_kv.lab.statistics.many_tests import benjamini_hochberg, permute_map
from programmable_kv.lab.statistics.null_band import null_band
from programmable_kv.lab.statistics.paired import (
    PairedCounts,
    mcnemar,
    tost_differences,
    tost_independent,
    tost_paired,
)
from programmable_kv.records import cluster_bootstrap, wilson


def test_paired_counts_are_of_the_same_items() -> None:
    counts = PairedCounts.of([True, True, False, False], [True, False, True, False])
    assert counts == PairedCounts(1, 1, 1, 1)
    assert (counts.n, counts.difference) == (4, 0.0)
    with pytest.raises(ValueError, match="zip"):
        PairedCounts.of([True], [True, False])


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 5), (8, 1), (3, 3)])
def test_mcnemar_is_a_binomial_test_of_the_differing_items(only_first: int, only_second: int) -> None:
    n, least = only_first + only_second, min(only_first, only_second)
    expected = min(1.0, 2 * binom.cdf(least, n, 0.5))
    assert mcnemar(PairedCounts(10, only_first, only_second, 2)) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_keeps_its_level() -> None:
    """Exact: P(p <= 0.05), summed over all outcomes of 20 differing items, is at most 0.05."""
    p = [mcnemar(PairedCounts(0, k, 20 - k, 0)) for k in range(21)]
    assert 0.02 < sum(binom.pmf(k, 20, 0.5) for k in range(21) if p[k] <= 0.05) <= 0.05


@pytest.mark.parametrize(("only_first", "n"), [(1, 44), (6, 60)])
def test_where_one_arm_is_never_better_alone_the_score_limit_is_wilsons(only_first: int, n: int) -> None:
    """With no item for the second arm alone, its likeliest share is 0 and Tango's variance is a proportion's."""
    bound = wilson(only_first, n).high
    first = PairedCounts(n - only_first, only_first, 0, 0)
    second = PairedCounts(n - only_first, 0, only_first, 0)
    assert tost_paired(first, bound).p_upper == pytest.approx(0.025, abs=1e-9)
    assert tost_paired(second, bound).p_lower == pytest.approx(0.025, abs=1e-9)


def test_tost_without_a_differing_item_depends_on_how_many_items_there_are() -> None:
    assert tost_paired(PairedCounts(20, 0, 0, 0), 0.03).p > 0.05
    assert tost_paired(PairedCounts(200, 0, 0, 0), 0.03).p < 0.05
    assert tost_paired(PairedCounts(100, 60, 10, 30), 0.03).p > 0.5, "a difference of 0.25 is not equivalence"
    for margin, counts in ((0.0, PairedCounts(1, 0, 0, 0)), (0.1, PairedCounts(0, 0, 0, 0))):
        with pytest.raises(ValueError, match="margin"):
            tost_paired(counts, margin)


def test_tost_rejects_rarely_at_the_edge_of_the_margin() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(200, [0.7, 0.15, 0.05, 0.1], size=1000)  # the difference is the margin
    rate = np.mean([tost_paired(PairedCounts(*map(int, row)), 0.1).p <= 0.05 for row in drawn])
    assert 0.02 < rate < 0.07, rate


def test_tost_of_independent_samples_and_of_differences() -> None:
    assert tost_independent((95, 95), (100, 100), 0.1).p < 0.05
    assert tost_independent((95, 80), (100, 100), 0.1).p > 0.05
    found = tost_differences([0.01, -0.02, 0.015, 0.0, -0.01], 0.1)
    values = np.array([0.01, -0.02, 0.015, 0.0, -0.01])
    t = (values.mean() - 0.1) / (values.std(ddof=1) / 5**0.5)
    assert t < 0
    assert found.p_upper < norm.cdf(-2)
    assert found.p == max(found.p_lower, found.p_upper) < 0.001
    with pytest.raises(ValueError, match="without spread"):
        tost_differences([0.0, 0.0], 0.1)


@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
def test_clopper_pearson_covers_at_least_as_often_as_it_says(share: float) -> None:
    covered = 0.0
    for k in range(31):
        interval = clopper_pearson(k, 30)
        covered += binom.pmf(k, 30, share) * (interval.low <= share <= interval.high)
    assert covered >= 0.95
    assert clopper_pearson(0, 8).high == pytest.approx(1 - 0.025 ** (1 / 8))
    assert clopper_pearson(0, 0).high == 1.0


def test_the_cluster_interval_is_wider_where_clusters_differ() -> None:
    rng = np.random.default_rng(1)
    clusters = {str(i): list(rng.normal(loc=rng.normal(), size=20)) for i in range(12)}
    by_cluster = cluster_interval(clusters, lambda items: float(np.mean(items)), seed=3)
    flat = cluster_interval({f"{k}{i}": [v] for k, each in clusters.items() for i, v in enumerate(each)}, np.mean)
    assert by_cluster.high - by_cluster.low > 2 * (flat.high - flat.low)
    fast = cluster_bootstrap(list(clusters.values()))
    assert by_cluster.low == pytest.approx(fast.low, abs=0.05)
    assert by_cluster == cluster_interval(clusters, lambda items: float(np.mean(items)), seed=3), "seeded"
    with pytest.raises(ValueError, match="several clusters"):
        cluster_interval({"a": [1.0]}, lambda items: items[0])


def test_the_cluster_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(150):
        clusters = {str(i): list(rng.normal(loc=rng.normal(), size=4)) for i in range(25)}
        interval = cluster_interval(clusters, lambda items: sum(items) / len(items), resamples=200, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert 0.87 <= covered / 150 <= 0.99, covered / 150


def test_benjamini_hochberg_by_hand() -> None:
    """Of m sorted p-values the i-th becomes min over j >= i of p_j m / j (1995, section 3)."""
    assert benjamini_hochberg([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.16 / 3, 0.04, 0.16 / 3, 0.5])
    assert benjamini_hochberg([]) == []


def test_a_maps_largest_cell_is_judged_by_largest_cells() -> None:
    """40 maps of noise with 50 cells each: a plain test finds something in nearly all of them, this one in about 5%."""
    rng = np.random.default_rng(4)
    groups = [str(i // 8) for i in range(48)]
    labels = [bool(i % 2) for i in range(48)]
    found = 0
    for trial in range(40):
        scores = rng.normal(size=(48, 50)) * np.linspace(0.1, 10, 50) + np.repeat(rng.normal(size=6) * 30, 8)[:, None]
        found += permute_map(scores, labels, groups, permutations=200, seed=trial).p_values.min() <= 0.05
    assert found <= 6, found
    scores[:, 7] += 3 * np.where(labels, np.linspace(0.1, 10, 50)[7], 0)
    tested = permute_map(scores, labels, groups, permutations=300)
    assert tested.p_values[7] <= 0.01
    assert tested.statistics[7] == tested.statistics.max() > tested.threshold


def test_labels_are_permuted_within_groups_only() -> None:
    """A label that is the group itself cannot be told from it; and a difference between groups is none between labels."""
    with pytest.raises(ValueError, match="nothing to permute"):
        permute_map(np.zeros((4, 1)), [True, True, False, False], ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="do not fit"):
        permute_map(np.zeros((4, 1)), [True], ["a"])
    scores = np.array([[100.0], [101.0], [0.0], [1.0]] * 8)
    tested = permute_map(scores, [False, True] * 16, ["a", "a", "b", "b"] * 8, permutations=200)
    assert tested.p_values[0] < 0.01, "the difference of 1 within groups shows behind one of 100 between them"


def test_a_null_band_tells_change_from_arithmetic() -> None:
    band = null_band({"eager": [0.9999, 0.9998], "bfloat16": [0.997, 0.999]})
    assert (band.low, band.high, band.n, band.variants) == (0.997, 0.9999, 4, ("eager", "bfloat16"))
    assert [band.position(value) for value in (0.98, 0.998, 1.0)] == ["below", "inside", "above"]
    for wrong in ({}, {"eager": [float("nan")]}):
        with pytest.raises(ValueError, match="null band"):
            null_band(wrong)
