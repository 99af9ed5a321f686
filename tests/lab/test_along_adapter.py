"""Shares of an adapter: none of it is the base, all of it the merged model; and the record of what is between."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny, tiny_engine
from programmable_kv.errors import ModelUnavailableError
from programmable_kv.lab import along_adapter
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.control import randomised
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.models.fetch import merged
from programmable_kv.models.load import Model
from programmable_kv.records import read_record

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_engine("llama").model


@pytest.fixture(scope="module")
def adapter(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random numbers in both factors, so that it changes every weight that it targets."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(folder)
    return folder


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def test_none_of_an_adapter_is_the_base_and_half_of_it_is_half_way(base: Any, adapter: Path) -> None:
    none, half, whole = (weights(merged(copy.deepcopy(base), adapter, part)) for part in (0.0, 0.5, 1.0))
    own = weights(base)
    assert none.keys() == whole.keys() == own.keys()
    changed = {name for name in own if not torch.equal(own[name], whole[name])}
    assert changed == {name for name in own if "q_proj" in name or "down_proj" in name}
    for name, weight in own.items():
        assert torch.equal(none[name], weight)
        torch.testing.assert_close(half[name], (weight + whole[name]) / 2)
    default = weights(merged(copy.deepcopy(base), adapter))
    assert all(torch.equal(default[name], whole[name]) for name in whole)


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    deeper = tiny_engine("llama", num_hidden_layers=1).model
    with pytest.raises(ModelUnavailableError, match="does not fit"):
        merged(deeper, adapter)


def test_a_record_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(along_adapter, "SHARES", (0.0, 1.0))
    model = tiny(max_position_embeddings=8192)
    other = randomised(model)
    asked: list[float] = []

    def joined(part: float) -> Model:
        asked.append(part)
        return model if part else other

    record: Any = along_adapter.run(model, 24, tmp_path / "it.json", joined=joined)
    assert record.complete
    assert asked == [0.0, 1.0]
    policies = record.rows[1]["policies"]
    assert record.summary["at_100"]["policies"] == len(policies) > 2
    assert record.rows[0]["policies"] != policies
    # All later tokens and the field are the other context.
    found = (pair_of(model, case) for case in cases(24))
    pair = next(pair for pair in found if isinstance(pair, Pair))
    assert policies[0]["old_gap"] == pytest.approx(pair.scale.old, abs=1e-4)
    assert policies[0]["new_gap"] == pytest.approx(pair.scale.new, abs=1e-4)
    assert set(policies[0]["patched"]) >= {"field", "first_of_actions", "actions", "both_rules", "later"}


def test_what_is_kept_and_carried_counts_where_both_prefills_are_right() -> None:
    def row(domain: str, *, valid: bool, field: float, actions: float) -> dict[str, Any]:
        patched = {"field": field, "actions": actions}
        return {"domain": domain, "valid": valid, "old_gap": -2.0, "new_gap": 2.0, "patched": patched}

    policies = [
        row("a", valid=True, field=-2.0, actions=1.0),
        row("b", valid=True, field=1.0, actions=2.0),
        row("b", valid=False, field=2.0, actions=-2.0),
    ]
    found = along_adapter.summed({"policies": policies, "read": {}})
    assert found["right"]["value"] == pytest.approx(2 / 3)
    assert found["kept"]["value"] == 0.5
    assert found["actions"]["recovery"]["value"] == pytest.approx((0.75 + 1) / 2)
    assert found["field"]["recovery"]["value"] == pytest.approx((0 + 0.75) / 2)
    assert found["span"]["value"] == 4.0


@pytest.mark.skipif(not (RESULTS / "along-adapter.json").exists(), reason="there is no record of it yet")
def test_all_of_the_adapter_decided_as_the_embedded_model_did() -> None:
    """The same policies in two records: the base with all of its adapter, and the shipped weights."""
    joined, shipped = (read_record(RESULTS / f"{name}.json") for name in ("along-adapter", "where-notes-are"))
    (whole,) = (row for row in joined.rows if row["share"] == 1.0)
    known = {row["number"]: row for row in shipped.rows if row["part"] == "scoring" and "skipped" not in row}
    shared = [each for each in whole["policies"] if each["number"] in known]
    assert len(shared) > 10
    for each in shared:
        assert each["old_gap"] == pytest.approx(known[each["number"]]["old_gap"], abs=0.05, rel=0.01)
        assert each["new_gap"] == pytest.approx(known[each["number"]]["new_gap"], abs=0.05, rel=0.01)
