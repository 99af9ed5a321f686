"""Prediction of an outcome in held-out groups: what is planted is found, and what is not there is not."""

from __future__ import annotations

import numpy as np
import pytest

from programmable_kv.lab.experiments.prediction import _adjust
from programmable_kv.lab.statistics.prediction import area, held_out_scores, predicted

GROUPS = [f"group {number % 8}" for number in range(160)]


def drawn(seed: int = 0) -> tuple[np.ndarray, list[bool]]:
    """Features of noise, and labels that depend on the first of them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(160, 4))
    return features, (features[:, 0] + rng.normal(scale=0.7, size=160) > 0.8).tolist()


def test_an_area_is_the_chance_to_rank_a_pair_correctly() -> None:
    assert area([3, 2, 1, 0], [True, True, False, False]) == 1
    assert area([0, 1, 2, 3], [True, True, False, False]) == 0
    assert area([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert area([2, 1, 1, 0], [True, True, False, False]) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="with and without"):
        area([1, 2], [True, True])


def test_a_planted_cause_is_found_in_groups_never_seen() -> None:
    features, labels = drawn()
    score = predicted(features, labels, GROUPS, permutations=20)
    assert score.auc.value > 0.8
    assert score.auc.low > score.chance_high
    assert score.p == pytest.approx(1 / 21)


def test_noise_predicts_nothing() -> None:
    features, labels = drawn()
    score = predicted(features[:, 1:], labels, GROUPS, permutations=20)
    assert score.auc.value < score.chance_high
    assert score.p > 0.05
    assert 0.3 < score.chance < 0.6


def test_that_groups_differ_is_no_prediction() -> None:
    """A feature that knows the group alone: labels permuted within groups do as well."""
    rng = np.random.default_rng(1)
    often = {group: number % 2 for number, group in enumerate(dict.fromkeys(GROUPS))}
    labels = [bool(rng.random() < (0.7 if often[group] else 0.2)) for group in GROUPS]
    features = np.array([[often[group]] for group in GROUPS], dtype=float)
    score = predicted(features, labels, GROUPS, permutations=20)
    assert score.auc.value > 0.6
    assert score.p > 0.05


def test_an_item_is_scored_by_others_groups_alone() -> None:
    features, labels = drawn()
    scores = held_out_scores(features, labels, GROUPS)
    inside = [number for number, group in enumerate(GROUPS) if group == "group 3"]
    turned = [not label if number in inside else label for number, label in enumerate(labels)]
    again = held_out_scores(features, turned, GROUPS)
    assert np.array_equal(scores[inside], again[inside])
    assert not np.array_equal(scores, again)


def test_tests_are_adjusted_for_each_other() -> None:
    tests: list[dict[str, float]] = [{"p": 0.01}, {"p": 0.02}, {"p": 0.5}]
    _adjust(tests)
    assert [test["p_adjusted"] for test in tests] == pytest.approx([0.03, 0.03, 0.5])
    _adjust([])
