"""Pairs of contexts, on a tiny random model in float64: all patched is the other context, nothing patched is one's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv.lab.experiments.cases import RANKING_SEED, SEED, cases, domain_names
from programmable_kv.lab.experiments.control import RANDOM_WEIGHTS, randomised
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair, aligned, pair_of
from programmable_kv.lab.experiments.written import LATER, RULES, Part, Text
from programmable_kv.lab.tools.together import Probe

CLOSE = {"rel": 1e-9, "abs": 1e-9}


def pairs(model: Any, seed: int = SEED, *, everyday: bool = False) -> Iterator[Pair]:
    """The pairs that the tiny tokenizer, under which most values differ in length, allows."""
    found = (pair_of(model, case) for case in cases(64, seed, everyday=everyday))
    return (pair for pair in found if isinstance(pair, Pair))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(max_position_embeddings=8192)


@pytest.fixture(scope="module")
def pair(model: Any) -> Pair:
    return next(pairs(model))


def contents(pair: Pair) -> list[torch.Tensor]:
    return [tensor.clone() for buffer in (pair.old, pair.fresh) for tensor in buffer.tensors().values()]


def test_a_longer_draw_begins_with_a_shorter_one() -> None:
    assert cases(20)[:5] == cases(5)
    assert cases(5) != cases(5, RANKING_SEED)
    assert len({case.domain for case in cases(16)}) == 16
    everyday = cases(20, everyday=True)
    assert everyday[:5] == cases(5, everyday=True)
    assert {case.domain for case in (*everyday, *cases(16))} <= set(domain_names())
    for case in (*cases(8), *everyday):
        assert all(case.gate.actions[old] != case.gate.actions[new] for old, new in case.changes)


def test_everything_patched_is_the_other_context_and_nothing_is_ones_own(pair: Pair) -> None:
    text = pair.text
    everything = Probe((*text.field.range, *text.later))
    before = contents(pair)
    old, new = pair.scale.old, pair.scale.new
    assert abs(new - old) > 1e-3
    assert pair.gaps([Probe(), everything]) == pytest.approx([old, new], **CLOSE)
    assert pair.gaps([Probe(), everything], noising=True) == pytest.approx([new, old], **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(pair), strict=True))


def test_everything_recomputed_is_a_full_prefill_and_the_field_alone_is_the_field_patched(pair: Pair) -> None:
    text = pair.text
    before = contents(pair)
    own = tuple(text.field.range)
    assert pair.recomputed(()) == pytest.approx(pair.scale.old, **CLOSE)
    assert pair.recomputed((*own, *text.later)) == pytest.approx(pair.scale.new, **CLOSE)
    # No later token changes, and none before the field: its rows are those of the new prefill.
    assert pair.recomputed(own) == pytest.approx(pair.gaps([Probe(own)])[0], **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(pair), strict=True))


def test_the_two_texts_differ_in_the_field_alone(pair: Pair) -> None:
    assert aligned(pair.old_text, pair.new_text)
    differing = [s for s, (a, b) in enumerate(zip(pair.old_text.ids, pair.new_text.ids, strict=True)) if a != b]
    assert set(differing) <= set(pair.text.field.range)
    assert differing


def test_every_slot_has_its_kind(model: Any) -> None:
    for pair in (next(pairs(model)), next(pairs(model, RANKING_SEED)), next(pairs(model, everyday=True))):
        text, case = pair.text, pair.case

        def said(*kinds: Text, text: Any = text) -> str:
            return "".join(text.tokens[slot] for slot in text.of(*kinds))

        old, new = pair.change
        assert "".join(text.tokens[slot] for slot in text.field.range).strip(" .=:") == old
        for kind, value in ((Text.OLD_RULE, old), (Text.NEW_RULE, new)):
            assert all(it in said(kind) for it in (case.gate.field, value, case.gate.actions[value])), said(kind)
        assert case.asked in said(Text.QUESTION)
        assert case.gate.field not in said(Text.FILLER)
        assert "assistant" in said(Text.TEMPLATE)
        assert text.kinds[-1] is Text.LAST
        assert set(text.later) == {slot for kind in LATER for slot in text.of(kind)}
        for part, words in ((Part.VALUE, pair.change), (Part.ACTION, pair.actions)):
            slots = [slot for slot in text.of(*RULES[:2]) if text.parts[slot] is part]
            found = "".join(text.tokens[slot] for slot in slots)
            assert all(word[1:-1] in found for word in words), (part, found)
        assert all(text.parts[slot] is Part.NONE for slot in text.later if text.kinds[slot] not in RULES)
        assert not any(text.delimits(slot) for slot in text.of(Text.TEMPLATE))


def test_a_null_is_as_large_of_the_same_places_and_disjoint() -> None:
    chosen, eligible = (2, 3, 17, 18), range(20)
    found = matched(chosen, eligible, random.Random(0))
    assert found is not None
    slots, strata = found
    assert len(slots) == len(chosen)
    assert not set(slots) & set(chosen)
    assert strata == 5  # in tenths, two tokens each, there are none beside those chosen
    assert sum(slot < 10 for slot in slots) == 2
    assert matched(range(15), eligible, random.Random(0)) is None


def test_the_control_has_the_same_numbers_in_other_places(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.engine.model.state_dict().items()}
    control = randomised(model)
    assert control.name == RANDOM_WEIGHTS
    assert control.fingerprint != model.fingerprint
    for name, tensor in control.engine.model.named_parameters():
        same = torch.equal(tensor, before[name])
        assert same if tensor.ndim == 1 else not same, name
        assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values), name
    after = model.engine.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
