"""Exchanges by layer, on a tiny random model in float64: before the first layer nothing is known, after the last all is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv.lab.experiments import timing
from programmable_kv.lab.experiments.cases import RANKING_SEED, cases
from programmable_kv.lab.experiments.kept import Kept
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.tools.changes import replaced
from programmable_kv.lab.tools.sites import Place, Site, changed
from programmable_kv.lab.tools.together import Probe

CLOSE: Any = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    model = tiny(max_position_embeddings=8192, num_hidden_layers=3)
    found = (pair_of(model, case) for case in cases(64, RANKING_SEED))
    return [pair for pair in found if isinstance(pair, Pair)][:3]


@pytest.fixture(scope="module")
def pair(pairs: list[Pair]) -> Pair:
    return pairs[0]


def test_the_deciding_rows_stream_decides_nothing_at_first_and_everything_at_last(pair: Pair) -> None:
    before = [each.clone() for each in pair.old.tensors().values()]
    new = timing.last_streams(pair, pair.fresh)
    gaps = timing.deciding(pair, new)
    assert len(gaps) == len(pair.old) + 1
    assert gaps[0] == pytest.approx(pair.scale.old, **CLOSE), "its own token is the same in both contexts"
    assert gaps[-1] == pytest.approx(pair.scale.new, **CLOSE)
    assert timing.deciding(pair, timing.last_streams(pair, pair.old)) == pytest.approx(
        [pair.scale.old] * len(gaps), **CLOSE
    )
    # A copy of the row for each layer is as good as a forward for each layer.
    for layer in range(len(gaps)):
        site, slot = Site(Place.RESIDUAL, layer), pair.old.length
        with changed(pair.engine, pair.old, site, replaced(new[layer]), [slot]):
            alone = pair.engine.append(pair.old, [pair.token])[-1]
        assert float(pair.gap_in(alone)) == pytest.approx(gaps[layer], **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.old.tensors().values(), strict=True))


def test_curves_begin_and_end_where_they_must(pair: Pair) -> None:
    row: Any = timing.measure(pair, [])
    layers = len(pair.old)
    notes = timing.Streams(pair).notes
    old, new = round(pair.scale.old, 4), round(pair.scale.new, 4)
    (patched,) = pair.gaps([Probe(notes.slots)])
    assert row["written"]["0"] == pytest.approx(old, abs=1e-4)
    last = str(layers - 1)
    assert row["written"][last] == pytest.approx(row["read_from"][last], abs=1e-4), (
        "the last layer's rows are its stream"
    )
    assert row["written"][last] != pytest.approx(old, abs=1e-4)
    assert row["read_from"]["0"] == pytest.approx(patched, abs=1e-4)
    assert row["read_from"][str(layers)] == pytest.approx(old, abs=1e-4), "no layer reads the new notes"
    assert row["committed"]["0"] == pytest.approx(old, abs=1e-4)
    assert row["committed"][str(layers)] == pytest.approx(new, abs=1e-4)
    assert row["lens"]["old"][str(layers)] == pytest.approx(old, abs=1e-4), "the lens ends at the model's own output"
    assert row["lens"]["new"][str(layers)] == pytest.approx(new, abs=1e-4)
    assert row["lens"]["old"]["0"] == row["lens"]["new"]["0"]


def test_depths_are_where_half_is_reached_and_kept(pair: Pair) -> None:
    span = pair.scale.new - pair.scale.old

    def gaps(*recovered: float) -> dict[str, float]:
        return {str(layer): pair.scale.old + each * span for layer, each in enumerate(recovered)}

    row = {"written": gaps(0, 0.3, 0.1), "read_from": gaps(0.8, 0.5, 0.3, 0), "committed": gaps(0, 0.6, 0.4, 1)}
    found = timing._depths(pair, row)
    assert found == {"written": round(1 / 3, 4), "read": round(1 / 3, 4), "committed": 1.0}
    nothing = timing._depths(pair, row | {"written": gaps(0, 0, 0), "read_from": gaps(0, 0, 0, 0)})
    assert nothing["written"] is None
    assert nothing["read"] is None


def test_items_say_which_rule_applies(pair: Pair) -> None:
    items = timing.Streams(pair).items
    assert items["notes"].streams.shape[1] == 4
    assert sum(items["notes"].labels) == 2
    assert items["last"].streams.shape[1] == 2
    assert items["last"].labels[0] != items["last"].labels[1]
    assert items["last"].labels[0] == items["notes"].labels[0], (
        "the first rule's note applies in the old context, or not"
    )
    assert items["last"].kinds == pair.actions


def test_a_row_with_others_reads_both_places(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(timing, "_ITEMS", Kept(timing._items_of, timing._probes_of))
    first, *rest = pairs
    others: Any = [timing.rank(pair) | {"number": pair.case.number, "domain": pair.case.domain} for pair in rest]
    row: Any = timing.measure(first, others)
    layers = len(first.old)
    for place in ("notes", "last"):
        assert len(row["probes"][place]["applies"]) == len(row["probes"][place]["control"]) == layers + 1
    assert row["probes"]["notes"]["applies"][0] == 0.5, "before the first layer a note is its token alone"
    assert row["probes"]["last"]["applies"][0] == 0.5
    scored = [row | {"domain": domain, "valid": True, "old_gap": -1.0, "new_gap": 1.0} for domain in "ab"]
    summary = timing.summarise(scored)
    assert summary["lens"][str(layers)]["right"]["n"] == 2
    assert summary["probes"]["notes"]["applies"]["0"]["value"] == 0.5
    assert summary["probes"]["last"]["best"] >= 0.5
    assert summary["depth"]["committed"]["n"] == 2
