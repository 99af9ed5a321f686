"""Rankings by attribution beside exact ones, on a tiny random model in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest

from conftest import tiny
from programmable_kv.lab.experiments import attribution
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.written import RULES, Part
from programmable_kv.lab.statistics.ranks import overlap, spearman
from programmable_kv.lab.tools.together import Probe


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair))


@pytest.fixture(scope="module")
def row(pair: Pair) -> Any:
    return attribution.measure(pair, [])


def test_exact_effects_are_those_of_single_patches(pair: Pair, row: Any) -> None:
    later = pair.text.later
    assert len(row["exact"]) == len(row["attributed"]) == len(later)
    for index in (0, 7, len(later) - 1):
        (gap,) = pair.gaps([Probe((later[index],))])
        assert row["exact"][index] == pytest.approx(gap - pair.scale.old, rel=1e-2, abs=1e-6)
    assert row["tokens"]["attributed"]["signed"] == pytest.approx(spearman(row["attributed"], row["exact"]), abs=1e-2)


def test_the_best_tokens_by_exact_effect_are_patched_together(pair: Pair, row: Any) -> None:
    later = pair.text.later
    order = sorted(range(len(later)), key=lambda i: (-row["exact"][i], -i))[: attribution.TOP]
    (gap,) = pair.gaps([Probe(tuple(sorted(later[i] for i in order)))])
    assert row["top"]["exact"] == pytest.approx(gap, abs=1e-3)


def test_costs_are_counted_in_rows(pair: Pair, row: Any) -> None:
    layers, heads = len(pair.old), pair.old.keys(0).shape[1]
    later = len(pair.text.later)
    assert row["rows"] == {
        "tokens": later, "places": layers * heads * later, "attributed": 3, "dropped": 1 + 2 * (1 + layers),
    }  # fmt: skip


def test_places_are_drawn_in_the_actions_and_outside(pair: Pair) -> None:
    drawn = attribution._places(pair, random.Random(0))
    actions = {slot for slot in pair.text.of(*RULES) if pair.text.parts[slot] is Part.ACTION}
    assert len(drawn) == len(set(drawn))
    inside = [slot for _, _, slot in drawn if slot in actions]
    assert 0 < len(inside) <= attribution.PLACES
    assert len(drawn) - len(inside) == attribution.PLACES


def test_a_perfect_score_ranks_perfectly_and_a_reversed_one_does_not() -> None:
    exact = [0.5, -0.4, 0.3, 0.001, 0.0, 0.02]
    found = attribution._compared(exact, {"attributed": list(exact), "moved": [-each for each in range(6)]})
    assert found["felt"] == 4
    assert found["attributed"] == {"sizes": 1.0, "felt": 1.0, "first": 1.0, "signed": 1.0}
    assert found["moved"]["sizes"] < 0
    assert "signed" not in found["moved"]


def test_a_summary_pools_the_tokens_of_all_policies(row: Any) -> None:
    rows = [row | {"domain": domain, "valid": True, "old_gap": -1.0, "new_gap": 1.0} for domain in "abc"]
    summary = attribution.summarise(rows)
    assert summary["pooled"]["signed"]["n"] == 3 * len(row["exact"])
    assert summary["pooled"]["signed"]["value"] == pytest.approx(row["tokens"]["attributed"]["signed"], abs=0.01)
    assert summary["fewer"]["tokens"] == pytest.approx(len(row["exact"]) / 3, abs=0.01)
    assert summary["top"]["exact"]["recovery"]["n"] == 3
    assert attribution.summarise([])["pooled"] == {}


def test_ranks() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [3, 2, 1]) is None
    assert overlap([3, 2, 1, 0], [0, 2, 3, 1], 2) == 0.5
    assert overlap([], [], 2) == 0.0
