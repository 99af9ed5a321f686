"""Prevention under masks, on a tiny random model in float64: where nothing may read a field, nothing knows of it."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments import prevention
from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.written import RULES, Part


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192, num_hidden_layers=3)  # a carrier is two layers behind the field
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair))


def moved(pair: Pair, chosen: tuple[int, ...], carrying: tuple[int, ...] = ()) -> set[int]:
    """The later slots in which anything differs between the old and the new text, prefilled under the same mask."""
    rule = prevention.reads(pair.text, chosen, carrying)
    old, new = (prevention.prefilled_under(pair, text, rule) for text in (pair.text, pair.new_text))
    apart = torch.stack(list(distances(old, new).values())).amax(dim=(0, 1))
    return {slot for slot in pair.text.later if apart[slot] > 0}


def test_the_field_reaches_the_readers_the_carriers_and_the_turn_and_nothing_else(pair: Pair) -> None:
    arms, turn = prevention.readers(pair.text), set(prevention.tail_of(pair.text))
    assert moved(pair, ()) == turn
    for name in ("readers", "line_ends", "values"):
        assert moved(pair, arms[name]) == turn | set(arms[name]), name
    # Carriers of a value that stand before it, or in the rule of a value that stands further below, have nothing to carry.
    carrying = prevention.carriers(pair.text, "values_carried_on")
    first = min(arms["values_carried_on"])
    reached = {slot for slot in carrying if slot > first}
    assert reached
    assert moved(pair, arms["values_carried_on"], carrying) == turn | set(arms["values_carried_on"]) | reached


def test_under_a_mask_of_everything_it_is_the_ordinary_prefill(pair: Pair) -> None:
    everything = prevention.reads(pair.text, pair.text.later)
    mine = prevention.prefilled_under(pair, pair.text, everything)
    for apart in distances(pair.old, mine).values():
        # What stands before the field may not read what is behind it anyway.
        assert float(apart.max()) < 1e-9


def test_an_edit_equals_a_prefill_of_the_new_text_under_the_same_mask(pair: Pair) -> None:
    text, tail = pair.text, prevention.tail_of(pair.text)
    for name, chosen in prevention.readers(text).items():
        carrying = prevention.carriers(text, name)
        rule = prevention.reads(text, chosen, carrying)
        edited, new = (prevention.prefilled_under(pair, each, rule) for each in (text, pair.new_text))
        slots = tuple(sorted({*text.field.range, *chosen, *carrying, *tail}))
        rows = Rows(tuple(pair.new_text.ids[slot] for slot in slots), slots, slots)
        pair.engine.compute(edited, rows, logits=0, reads=rule)
        assert all(float(apart.max()) < 1e-9 for apart in distances(new, edited).values()), name


def test_an_edit_that_leaves_the_readers_stale_is_no_prefill(pair: Pair) -> None:
    row = prevention.measure(pair, [])
    assert row["edit_from_prefill"] < 1e-3
    arms = row["arms"]
    assert arms["readers"]["stale_readers"]["gap"] != pytest.approx(arms["readers"]["edited"]["gap"], abs=1e-3)
    assert arms["nobody"]["stale_readers"] == arms["nobody"]["edited"]
    assert arms["causal"]["old"]["gap"] == pytest.approx(pair.scale.old, abs=1e-4)
    assert arms["causal"]["edited"]["gap"] == pytest.approx(pair.scale.new, abs=1e-4)
    assert arms["random_as_actions"]["tokens"] == arms["actions"]["tokens"]


def test_readers_are_the_tokens_that_they_are_called(pair: Pair) -> None:
    text, arms = pair.text, prevention.readers(pair.text)
    rules = set(text.of(*RULES))
    assert set(arms["readers"]) - rules == set(arms["readers"]) - {s for s in text.later if s in rules}
    assert set(arms["all_but_actions"]) | set(arms["actions"]) == rules
    assert all(text.parts[slot] is Part.END for slot in arms["line_ends"])
    assert "\n" in text.tokens[min(rules | set(arms["readers"]) - rules)] or arms["readers"][0] == text.field.stop
