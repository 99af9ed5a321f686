"""Toy policies, and what is measured of a model while it learns them: what must be equal is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from programmable_kv.engine import Engine
from programmable_kv.lab.tools.together import Probe, probed
from programmable_kv.lab.toy import emergence
from programmable_kv.lab.toy.policies import FIELD_SLOT, LENGTH, VOCABULARY, draw
from programmable_kv.lab.toy.training import ToyRecipe, new_model, train

SMALL = ToyRecipe(layers=2, width=32, heads=2, batch=8, plain_steps=4, updated_steps=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(new_model(SMALL, 0).double().eval())


def test_a_policy_says_what_its_slots_and_its_answer_say() -> None:
    rng = random.Random(0)
    for policy in (draw(rng, updates=0.5) for _ in range(50)):
        ids, slots = policy.ids(), policy.slots()
        assert len(ids) == LENGTH
        assert max(ids) < VOCABULARY
        rules = dict(zip((ids[s] for s in slots["values"]), (ids[s] for s in slots["actions"]), strict=True))
        said = ids[FIELD_SLOT] if policy.update is None else policy.line()[1]
        assert rules[said] == policy.right
        assert len(set(rules.values())) == len(rules)
        assert sorted(slot for each in slots.values() for slot in each) == list(range(4, LENGTH - 1))
        assert policy.update is None or policy.update != policy.value
    assert sum(draw(rng, updates=0.5).update is not None for _ in range(400)) in range(160, 240)
    assert not any(draw(rng).update for _ in range(50))


def test_no_policy_that_is_probed_is_ever_trained_on() -> None:
    rng = random.Random(1)
    trained = [draw(rng, updates=0.5) for _ in range(2000)]
    probed = emergence.probed_policies()
    assert not {each.actions for each in trained} & {each.actions for each in probed}
    assert {action for each in probed for action in each.actions} <= {
        action for each in trained for action in each.actions
    }, "what is new in a probed policy is the pair, not an action"


def test_all_patched_is_the_other_context_and_nothing_the_own(engine: Engine) -> None:
    policy = emergence.probed_policies()[0]
    other = policy.with_value(1 - policy.value)
    stale, fresh = (emergence.cached(engine, each) for each in (policy, other))
    sets = emergence.slots_of(policy, 0)
    everything = (*sets["field"], *sets["later"])
    token = policy.ids()[-1]
    found = probed(engine, stale, token, [Probe(), Probe(everything)], fresh)
    assert torch.allclose(found[1], probed(engine, fresh, token, [Probe()])[0], rtol=1e-9, atol=1e-9)
    assert torch.allclose(found[0], engine.append(stale, [token])[-1], rtol=1e-9, atol=1e-9)
    assert not set(sets["random_as_actions"]) & set(sets["actions"])
    assert len(sets["random_as_actions"]) == len(sets["actions"])


def test_an_update_on_a_stale_cache_is_the_whole_text_prefilled(engine: Engine) -> None:
    policy = emergence.probed_policies()[1]
    line = policy.updated(1 - policy.value)
    stale = emergence.cached(engine, policy)
    stale.truncate(LENGTH - 2 - len(policy.line()))
    told = engine.append(stale, [*line.line(), *policy.ids()[-2:]])[-1]
    whole = engine.append(engine.new_buffer(), line.ids())[-1]
    assert torch.allclose(told, whole, rtol=1e-9, atol=1e-9)


def test_training_shows_the_steps_it_says_and_depends_on_the_seed_alone() -> None:
    assert ToyRecipe().shown()[0] == 0
    assert ToyRecipe().shown()[-1] == ToyRecipe().steps
    weights: list[torch.Tensor] = []
    for seed in (3, 3, 4):
        seen: list[int] = []
        kept: dict[int, Any] = {}

        def show(step: int, model: Any, seen: list[int] = seen, kept: dict[int, Any] = kept) -> None:
            seen.append(step)
            kept[step] = model.lm_head.weight.detach().clone()

        train(SMALL, seed, show)
        assert seen == list(SMALL.shown()) == [0, 4, 7]
        assert not torch.equal(kept[0], kept[SMALL.steps])
        weights.append(kept[SMALL.steps])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_record_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emergence, "PROBED", 4)
    record = emergence.run(SMALL, 2, tmp_path / "emergence.json")
    assert record.complete
    assert record.figure("models") == 2
    assert record.figure("competent_models") == 0
    assert [row["seed"] for row in record.rows] == [0, 1]
    assert set(record.rows[0]["steps"][0]["moved"]) == set(emergence.SETS)


def steps_of(*found: tuple[int, float, float, float, float]) -> list[dict[str, Any]]:
    """(step, right, obeyed, moved by the field, moved by the actions), of a span of ten."""
    return [
        {"step": step, "right": right, "obeyed": obeyed, "span": 10.0,
         "moved": dict.fromkeys(emergence.SETS, 0.0) | {"field": field, "actions": actions}}
        for step, right, obeyed, field, actions in found
    ]  # fmt: skip


def test_what_carried_the_decision_is_read_where_it_was_first_made_and_where_it_was_right() -> None:
    row = {"seed": 0, "steps": steps_of((0, 0, 0.4, 1, 1), (20, 0.95, 0.0, 4, 5), (40, 1, 0.95, 0, 9))}
    row["steps"][0]["span"] = 0.1
    never = {"seed": 1, "steps": steps_of((0, 0, 0.4, 0, 1), (20, 0.5, 0.2, 4, 3), (40, 0.5, 0.5, 2, 2))}
    found = emergence.summarise([row, never], 20)
    assert (found["models"], found["competent_models"], found["obeying_models"]) == (2, 1, 1)
    assert found["first"]["step"]["value"] == 20
    assert found["first"]["actions"]["value"] == 0.5
    assert found["earliest"]["step"]["value"] == 10, "a step at which nothing moves the decision is none"
    assert found["earliest"]["actions"]["value"] == pytest.approx(0.3)
    assert found["untaught"]["obeyed"]["value"] == pytest.approx(0.0), "of the model that was competent"
    assert found["end"]["obeyed"]["value"] == pytest.approx(0.95)
    assert found["end"]["actions"]["value"] == pytest.approx(0.9)
    assert found["most_by_field"]["value"] == pytest.approx(0.4)
