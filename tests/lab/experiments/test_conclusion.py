"""Notes exchanged along subspaces, on a tiny random model in float64: along all of them is a patch, along none is nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv.lab.experiments import conclusion
from programmable_kv.lab.experiments.cases import RANKING_SEED, cases
from programmable_kv.lab.experiments.dissociation import donors, exchanged_texts
from programmable_kv.lab.experiments.kept import Kept
from programmable_kv.lab.experiments.learned import DIMENSIONS, Example, Learned
from programmable_kv.lab.experiments.note_rows import NoteRows, shifted
from programmable_kv.lab.experiments.pair import Pair, appended_last, pair_of
from programmable_kv.lab.experiments.written import Text
from programmable_kv.lab.tools.changes import interchanged, projected_out, replaced
from programmable_kv.lab.tools.together import Probe

CLOSE: Any = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64, RANKING_SEED))
    # Of a span that is more than nothing, so that an exchange has something to learn.
    return [pair for pair in found if isinstance(pair, Pair) and pair.scale.new - pair.scale.old > 1e-3][:4]


@pytest.fixture(scope="module")
def pair(pairs: list[Pair]) -> Pair:
    return pairs[0]


@pytest.fixture(scope="module")
def learned(pairs: list[Pair]) -> Learned:
    return Learned([Example.of(pair) for pair in pairs])


@pytest.fixture(autouse=True)
def no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conclusion, "_EXAMPLES", Kept(Example.of, Learned))


def test_notes_exchanged_whole_from_the_first_layer_on_are_patched_notes(pair: Pair) -> None:
    notes = NoteRows(pair)
    assert len(notes.slots) == 2
    old, new = notes.streams(pair.old), notes.streams(pair.fresh)
    assert torch.equal(old[0], new[0]), "their tokens are the same"
    before = [each.clone() for each in pair.old.tensors().values()]
    assert notes.gap(1, None) == pytest.approx(pair.scale.old, **CLOSE)
    assert notes.gap(1, None, noising=True) == pytest.approx(pair.scale.new, **CLOSE)
    assert notes.gap(1, replaced(old[1])) == pytest.approx(pair.scale.old, **CLOSE)
    # The first layer caches what the tokens alone say, so from the second one on is all.
    patched = pair.gaps([Probe(notes.slots, layers=(1,))])[0]
    assert notes.gap(1, replaced(new[1])) == pytest.approx(patched, **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.old.tensors().values(), strict=True))


def test_many_exchanges_in_one_forward_are_each_of_them_alone(pair: Pair) -> None:
    notes = NoteRows(pair)
    old, new = notes.streams(pair.old), notes.streams(pair.fresh)
    basis = torch.linalg.qr(torch.randn(new.shape[-1], 2, dtype=new.dtype)).Q
    every = [
        (0, replaced(new[0])), (1, replaced(new[1])), (1, replaced(old[1])), (1, interchanged(new[1], basis)),
        (1, projected_out(basis)), (1, shifted(basis[:, 0], [1.0, -2.0])),
    ]  # fmt: skip
    for noising in (False, True):
        alone = [notes.gap(layer, change, noising=noising) for layer, change in every]
        assert notes.gaps(every, noising=noising) == pytest.approx(alone, **CLOSE)
        assert len(set(alone)) > 3
    assert notes.gaps(every)[2] == pytest.approx(pair.scale.old, **CLOSE)
    assert notes.gaps([]) == []


def test_another_text_is_computed_from_where_it_differs_and_is_what_its_prefill_gives(pair: Pair) -> None:
    notes, texts = NoteRows(pair), exchanged_texts(pair)
    prefills = donors(pair)
    assert set(texts) == {"rules", "both"}
    before = [each.clone() for each in pair.fresh.tensors().values()]
    for name, text in texts.items():
        for noising in (False, True):
            found = notes.streams_of(text, noising=noising)
            assert torch.allclose(found, notes.streams(prefills[name]), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(notes.streams_of(text)[-1], notes.streams(pair.old)[-1], rtol=1e-9, atol=1e-9)
    assert torch.allclose(notes.streams_of(pair.new_text), notes.streams(pair.fresh), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.fresh.tensors().values(), strict=True))


def test_along_every_dimension_is_the_whole_and_along_two_halves_too(pair: Pair) -> None:
    notes = NoteRows(pair)
    new = notes.streams(pair.fresh)[1]
    basis = torch.linalg.qr(torch.randn(new.shape[-1], new.shape[-1], dtype=new.dtype)).Q
    whole = notes.gap(1, replaced(new))
    assert notes.gap(1, interchanged(new, basis)) == pytest.approx(whole, **CLOSE)
    assert notes.gap(1, interchanged(new, basis[:, :1])) != pytest.approx(whole, **CLOSE)


def test_a_shift_of_nothing_is_nothing_and_each_row_has_its_own(pair: Pair) -> None:
    rows, direction = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    moved = shifted(direction, [2.0, -1.0])(rows, torch.tensor([1, 0]))
    assert moved.tolist() == [[0, -1, 0], [0, 2, 0]]
    notes = NoteRows(pair)
    unit = torch.nn.functional.normalize(notes.streams(pair.old)[1][0], dim=0)
    assert notes.gap(1, shifted(unit, [0.0, 0.0])) == pytest.approx(pair.scale.old, **CLOSE)
    assert notes.gap(1, shifted(unit, [1.0, 1.0])) != pytest.approx(pair.scale.old, **CLOSE)


def test_one_rule_applies_in_each_context(pair: Pair) -> None:
    notes = NoteRows(pair)
    applies = notes.applies
    assert sorted(applies["old"]) == sorted(applies["new"]) == [False, True]
    kinds = [pair.text.kinds[slot] for slot in notes.slots]
    assert [kind is Text.OLD_RULE for kind in kinds] == applies["old"]


def test_notes_appended_last_decide_as_in_their_places(pair: Pair) -> None:
    notes = NoteRows(pair)
    buffer, rows = appended_last(pair, pair.old, notes.slots)
    with pair.engine.graph(buffer, rows) as graph:
        assert float(pair.gap_in(graph.logits[-1]).detach()) == pytest.approx(pair.scale.old, **CLOSE)
    assert buffer.length == pair.old.length - 2


def test_what_an_exchange_learns_from_is_the_new_decision(pair: Pair, learned: Learned) -> None:
    example = learned.examples[0]
    logits = torch.zeros(pair.engine.vocabulary, dtype=torch.float64)
    new, old = (pair.first_tokens[action] for action in (pair.actions[1], pair.actions[0]))
    logits[new], logits[old] = pair.scale.new, 0.0
    assert float(example.exchange.loss(logits)) == pytest.approx(0, abs=1e-12)
    logits[new] = pair.scale.new + 2 * (pair.scale.new - pair.scale.old)
    assert float(example.exchange.loss(logits)) == pytest.approx(4, rel=1e-6)


def test_items_are_balanced_and_a_layer_without_a_conclusion_is_read_by_chance(learned: Learned, pair: Pair) -> None:
    pytest.importorskip("sklearn")
    streams, labels, kinds = learned.items.at(0)
    assert len(streams) == len(labels) == len(kinds) == 4 * len(learned.examples)
    assert sum(labels) == len(labels) / 2
    notes = NoteRows(pair)
    found = learned.probes.read(notes.items(notes.streams(pair.old), notes.streams(pair.fresh)), 0)
    # In the first layer a note is its token, the same in both contexts: one of each two labels is right.
    assert found["applies"][0] == 0.5
    assert len(found["applies"]) == len(found["control"]) == len(pair.old) + 1


def test_learnt_subspaces_are_orthonormal_and_start_where_notes_change(learned: Learned, pair: Pair) -> None:
    for k in DIMENSIONS[:2]:
        basis = learned.subspace(pair.engine, 1, k)
        assert torch.allclose(basis.T @ basis, torch.eye(k, dtype=basis.dtype), atol=1e-6)
        assert learned.subspace(pair.engine, 1, k) is basis, "learnt once"
    unit, apart, middle = learned.direction(1)
    streams, labels, _ = learned.items.at(1)
    along = streams @ unit
    marked = torch.tensor(labels)
    assert float(along[marked].mean() - along[~marked].mean()) == pytest.approx(apart)
    assert float(middle @ unit) == pytest.approx(float((along[marked].mean() + along[~marked].mean()) / 2))


def test_a_row_with_others_and_one_without(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("programmable_kv.lab.experiments.learned.STEPS", 1)
    first, *rest = pairs
    others = [conclusion.rank(pair) | {"number": pair.case.number, "domain": pair.case.domain} for pair in rest]
    row: Any = conclusion.measure(first, others)
    alone: Any = conclusion.measure(first, [])
    assert set(alone) == {"committed", "whole"}
    assert row["whole"] == alone["whole"]
    assert row["field"]["whole"] == row["whole"][str(row["site"])]
    monkeypatch.setattr(conclusion, "_EXAMPLES", Kept(Example.of, Learned))  # as after an interruption
    monkeypatch.setattr(
        "programmable_kv.lab.experiments.kept.pair_of",
        lambda model, case: next(pair for pair in rest if pair.case.number == case.number),
    )
    again: Any = conclusion.measure(first, others)
    assert again["along"] == row["along"]
    scored = [replace_scale(row, domain) for domain in "ab"]
    summary = conclusion.summarise(scored)
    assert summary["learned"] == 2
    assert summary["read"]["applies"]["0"]["value"] == 0.5


def replace_scale(row: Any, domain: str) -> Any:
    return row | {"domain": domain, "valid": True, "old_gap": -1.0, "new_gap": 1.0}


def test_a_site_is_the_layer_that_does_most_elsewhere(pair: Pair) -> None:
    others: Any = [{"whole": {"1": 0.2, "2": 0.1}}, {"whole": {"1": 0.0, "2": 0.4}}]
    assert conclusion._site(pair, others) == 2
