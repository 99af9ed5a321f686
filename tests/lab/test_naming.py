"""Notebooks that name their rows decide as notebooks that compute them, on a tiny random model in float64."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from conftest import tiny
from programmable_kv.edits.modes import Mode
from programmable_kv.engine import Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab import same_budget
from programmable_kv.lab.experiments import errata
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.tools.naming import naming, settled
from programmable_kv.lab.tools.shared_rows import SharedRows
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.movement import movement
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair))


def decision(pair: Pair, model: Model, mode: Mode, *, asked: bool | None, think: bool = False) -> Decision:
    """After an edit; or after a way back, the question asked in between or not."""
    notebook = errata.prefilled(model, pair, DEFAULT_TEMPLATE)
    if asked is None:
        return errata.edited(pair, notebook, mode, think=think)
    return errata.back(pair, notebook, mode, asked=asked)


@pytest.mark.parametrize(("known", "published"), [(False, True), (True, True), (True, False)])
def test_every_decision_is_that_of_a_notebook_that_computes(
    pair: Pair, known: bool, published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not published:  # the line does not read the field that is refreshed with it
        monkeypatch.setattr(errata, "as_published", lambda notebook: notebook)
    shared = SharedRows(pair.engine)
    for text, buffer in ((pair.old_text, pair.old), (pair.new_text, pair.fresh)) if known else ():
        shared.add(text.ids, buffer)
    model, engine = naming(pair.model, shared)
    asks = {
        f"{mode} {asked} {think}": partial(decision, pair, asked=asked, mode=mode, think=think)
        for mode in (Mode.STALE, Mode.IN_PLACE, Mode.ERRATUM, Mode.FIELD_ERRATUM, Mode.READERS, Mode.SUFFIX, Mode.FULL)
        for asked, think in ((None, False), (None, True), (False, False), (True, False))
    }
    found = settled(engine, {name: partial(ask, model=model) for name, ask in asks.items()})
    for name, ask in asks.items():
        plain = ask(model=pair.model)
        assert found[name].choice == plain.choice, name
        assert found[name].thought == plain.thought, name
        assert found[name].log_probabilities == pytest.approx(plain.log_probabilities, abs=1e-6), name
    assert len({round(each.gap(*pair.actions), 6) for each in found.values()}) > 8, "they differ from each other"


def test_a_row_is_computed_once_and_only_where_something_differs(pair: Pair) -> None:
    shared = SharedRows(pair.engine)
    shared.add(pair.text.ids, pair.old)
    model, engine = naming(pair.model, shared)
    ask = partial(decision, pair, model, Mode.IN_PLACE, asked=None)
    with pair.engine.meter.measure() as first:
        settled(engine, {"one": ask, "same": ask})
    with pair.engine.meter.measure() as second:
        settled(engine, {"again": ask})
    assert 0 < first.account.tokens_computed < len(pair.text.ids) / 2
    assert second.account.tokens_computed == 0


def test_what_depends_on_tensors_is_that_of_a_notebook_that_computes(pair: Pair) -> None:
    """What a question attends to, how far a value moves keys and values, and how many rows all of it takes."""
    model, engine = naming(pair.model, SharedRows(pair.engine))
    field, value = pair.case.gate.field, pair.change[1]
    named, plain = (errata.prefilled(each, pair, DEFAULT_TEMPLATE) for each in (model, pair.model))
    asks = {
        arm: partial(arm_of, pair, named, {field: value}, arm) for arm in (same_budget.ATTENTION, same_budget.DEVIATION)
    }
    found = settled(engine, {**asks, "attended": partial(decision, pair, model, Mode.SELECTIVE, asked=None)})
    attended = decision(pair, pair.model, Mode.SELECTIVE, asked=None)
    wanted = {arm: arm_of(pair, plain, {field: value}, arm) for arm in asks} | {"attended": attended}
    for arm, each in wanted.items():
        assert found[arm].log_probabilities == pytest.approx(each.log_probabilities, abs=1e-6), arm
        assert found[arm].account.tokens_computed == each.account.tokens_computed, arm
    assert len({round(each.gap(*pair.actions), 9) for each in found.values()}) == 3, "they differ from each other"
    assert torch.allclose(movement(named, field, value), movement(plain, field, value), atol=1e-9)


def arm_of(pair: Pair, notebook: Notebook, edit: dict[str, str], arm: str) -> Decision:
    def ask(mode: Mode, k: int) -> Decision:
        return notebook.decide(pair.case.asked, list(pair.first_tokens), edits=edit, mode=mode, k=k)

    ((_, found),) = same_budget.decisions(notebook, edit, random.Random(0), ask, [arm])
    return found


def test_names_are_no_keys(pair: Pair) -> None:
    _, engine = naming(pair.model, SharedRows(pair.engine))
    with pytest.raises(InvalidArgumentError, match="only named"):
        engine.attention_weights(engine.new_buffer(), Rows((1,), (0,), (0,)))
    for ask in (engine.attention_of, engine.compute):
        with pytest.raises(InvalidArgumentError, match="buffer of this engine"):
            ask(pair.engine.new_buffer(), Rows((1,), (0,), (0,)))
