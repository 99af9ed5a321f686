"""Features exchanged in notes, on a tiny random model in float64: all of a complete dictionary are a patch, none is nothing."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv.lab.experiments import sparse_features
from programmable_kv.lab.experiments.activations import Amount, plain, policies, streams_before
from programmable_kv.lab.experiments.cases import RANKING_SEED, cases
from programmable_kv.lab.experiments.features import Chosen, Coordinates, areas
from programmable_kv.lab.experiments.kept import Kept
from programmable_kv.lab.experiments.note_rows import NoteRows
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.read_by_layer import Items
from programmable_kv.lab.experiments.sparse_features import BRIEF, layer_of
from programmable_kv.lab.tools.changes import replaced
from programmable_kv.lab.tools.sparse_autoencoder import SparseAutoencoder
from programmable_kv.scenarios.vocabulary import held_out_domains

CLOSE: Any = {"rel": 1e-5, "abs": 1e-5}  # codes are float32


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64, RANKING_SEED))
    return [pair for pair in found if isinstance(pair, Pair)][:3]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_features, "_NOTES", Kept(sparse_features._notes_of, Items.together))
    monkeypatch.setattr(sparse_features, "_TRAINED", {})


def items_of(pair: Pair) -> tuple[torch.Tensor, list[bool]]:
    streams, labels, _ = sparse_features._notes_of(pair).at(1)
    return streams, labels


def test_all_features_of_a_dictionary_without_error_are_the_patch_and_none_is_nothing(pairs: list[Pair]) -> None:
    pair = pairs[0]
    notes, (rows, labels) = NoteRows(pair), items_of(pairs[1])
    old, new = (notes.streams(buffer)[1] for buffer in (pair.old, pair.fresh))
    width = old.shape[1]
    both = torch.cat((torch.eye(width), -torch.eye(width)))
    whole = notes.gap(1, replaced(new))
    assert abs(whole - pair.scale.old) > 20 * CLOSE["abs"]
    for dictionary in (
        Coordinates(width),
        SparseAutoencoder(both, torch.zeros(2 * width), both, torch.ones(width), 1.0, 2 * width),
    ):
        chosen = Chosen.of(dictionary, rows, labels)
        assert notes.gap(1, replaced(chosen.exchanged(old, new, chosen.order))) == pytest.approx(whole, **CLOSE)
        assert notes.gap(1, replaced(chosen.exchanged(old, new, []))) == pytest.approx(pair.scale.old, **CLOSE)
        assert notes.gap(1, replaced(chosen.exchanged(old, old, chosen.order))) == pytest.approx(
            pair.scale.old, **CLOSE
        )
        some = notes.gap(1, replaced(chosen.exchanged(old, new, chosen.order[:3])))
        assert some not in (pytest.approx(whole, **CLOSE), pytest.approx(pair.scale.old, **CLOSE))
    rebuilt = dictionary.decoded(dictionary.codes(new))
    assert notes.gap(1, replaced(rebuilt), noising=True) == pytest.approx(pair.scale.new, **CLOSE)


def test_what_an_autoencoder_does_not_explain_of_a_note_stays(pairs: list[Pair]) -> None:
    rows, labels = items_of(pairs[0])
    lossy = SparseAutoencoder(torch.eye(rows.shape[1])[:4], torch.zeros(4), torch.eye(rows.shape[1])[:4],
                              torch.zeros(rows.shape[1]), 1.0, 4)  # fmt: skip
    chosen = Chosen.of(lossy, rows, labels)
    moved = chosen.exchanged(rows[:2], rows[2:], chosen.order)
    assert torch.equal(moved[:, 4:], rows[:2, 4:])
    torch.testing.assert_close(moved[:, :4].relu(), rows[2:, :4].relu().to(moved), rtol=1e-4, atol=1e-5)


def test_features_are_chosen_by_what_differs_with_the_label() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator)
    labels = [bool(i % 2) for i in range(40)]
    rows[1::2, 4] += 6
    rows[1::2, 2] -= 9
    chosen = Chosen.of(Coordinates(6), rows, labels)
    assert chosen.order[:2] == (2, 4)
    assert chosen.best == 2
    assert chosen.sign == -1
    assert chosen.read(rows, labels) == 1.0
    flipped = [not each for each in labels]
    assert chosen.read(rows, flipped) == 0.0
    assert chosen.middle[2] == pytest.approx(float(rows[:, 2].mean()))
    ablated = chosen.ablated(rows, [2])
    assert torch.allclose(ablated[:, 2], rows[:, 2].mean())
    assert torch.equal(ablated[:, 3:], rows[:, 3:])


def test_areas_count_pairs_and_ties_half() -> None:
    codes = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 5.0]])
    assert areas(codes, [True, False, True]).tolist() == [0.5, 0.75]


def test_random_features_are_others_as_often_active_and_move_as_far() -> None:
    generator = torch.Generator().manual_seed(0)
    frequency = torch.tensor([1.0] * 12 + [0.1] * 12)
    codes = torch.rand(200, 24, generator=generator) * (torch.rand(200, 24, generator=generator) < frequency)
    labels = [bool(i % 2) for i in range(200)]
    chosen = Chosen.of(Coordinates(24), codes, labels)
    rng = random.Random(0)
    for first in ((0, 1, 2), (20, 21)):
        drawn = chosen.matched(first, rng)
        assert len(set(drawn)) == len(first)
        assert not set(drawn) & set(first)
        assert all((each < 12) == (first[0] < 12) for each in drawn)
    here, there = codes[:50], codes[50:100]
    moved = chosen.randomly_exchanged(here, there, (0, 1, 2), rng) - here
    far = chosen.change(here, there, (0, 1, 2)).norm(dim=1)
    torch.testing.assert_close(moved.norm(dim=1), far)
    assert not moved[:, :3].any()


def test_activations_are_of_the_training_side_and_none_is_of_a_first_token(pairs: list[Pair]) -> None:
    model = pairs[0].model
    texts = [model.tokenizer.decode(ids) for ids in policies(model, 6, "train")]
    roles = [domain.role for domain in held_out_domains()]
    assert not any(role in text for text in texts for role in roles)
    held_out = [model.tokenizer.decode(ids) for ids in policies(model, 6, "held_out")]
    assert all(any(role in text for role in roles) for text in held_out)
    assert [model.tokenizer.decode(ids) for ids in policies(model, 2, "train")] == texts[:2]
    windows = list(plain(model, 3, "train"))
    assert len(windows) == 3
    rows = streams_before(model, 1, Amount(2, 1))
    lengths = [len(ids) for ids in (*policies(model, 2, "train"), windows[0])]
    assert rows.shape == (sum(lengths) - 3, int(model.engine.model.config.hidden_size))
    assert rows.dtype == torch.float32


def test_a_row_with_others_has_every_arm_and_one_without_has_none(pairs: list[Pair]) -> None:
    first, *rest = pairs
    others: Any = [sparse_features.rank(p) | {"number": p.case.number, "domain": p.case.domain} for p in rest]
    measured = partial(sparse_features.measure, effort=BRIEF)
    alone: Any = measured(first, [])
    assert set(alone) == {"whole"}
    row: Any = measured(first, others)
    assert row["whole"] == alone["whole"]
    assert row["coordinates"]["exchanged"]["all"] == pytest.approx(row["whole"], abs=1e-3)
    for kind in sparse_features.KINDS:
        counts = set(row[kind]["random"])
        assert {"1", "3", "10"} <= counts
        assert set(row[kind]["exchanged"]) == counts | {"all"}
        assert 0 <= row[kind]["auc"] <= 1
    assert row["trained"]["held_out"]["policies"] != row["frozen"]["held_out"]["policies"]
    again: Any = measured(first, others)
    assert again == row, "trained once, and drawn by the policy's number"
    assert len(sparse_features._TRAINED) == 1
    scored = [row | {"domain": domain, "valid": True, "old_gap": -1.0, "new_gap": 1.0} for domain in "ab"]
    summary = sparse_features.summarise(scored)
    assert summary["trained"]["exchanged"]["10"]["recovery"]["n"] == 2
    assert summary["frozen"]["held_out"]["used"]["value"] == row["frozen"]["held_out"]["used"]
    unlearnt = [alone | {"domain": "a", "valid": True, "old_gap": -1.0, "new_gap": 1.0}]
    assert sparse_features.summarise(unlearnt)["learned"] == 0
    assert layer_of(len(first.old)) == 1
