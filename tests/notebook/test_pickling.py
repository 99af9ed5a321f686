"""A pickled notebook contains everything but the model, and finds the loaded model when it is read."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv import Notebook, Recency
from programmable_kv.errors import ModelUnavailableError, NotPrefilledError, OutOfStepError
from programmable_kv.models.load import Model
from programmable_kv.models.loaded import loaded_model, remember


def build(model: Model | None = None) -> Notebook:
    notebook = Notebook(model or tiny(), ranking=Recency())
    notebook.message("system", "status: {status}\nreply only.", status="shipped").mentions("status", "parcel")
    notebook.message("user", "the customer asks to cancel")
    notebook.prefill()
    notebook.edit(status="pending", mode="in_place")
    return notebook


def test_what_comes_back_is_the_same_notebook() -> None:
    notebook = build()
    other = pickle.loads(pickle.dumps(notebook))
    assert other.model is notebook.model
    assert (other.ids, other.fields, other.states) == (notebook.ids, notebook.fields, notebook.states)
    assert isinstance(other.ranking, Recency)
    for layer in range(len(notebook.cache)):
        assert torch.equal(other.cache.keys(layer), notebook.cache.keys(layer))
    # The copy is independent, and continues in the same way.
    assert other.decide("now?", ["cancel", "deny"]).choice == notebook.decide("now?", ["cancel", "deny"]).choice
    other.edit(status="lost", mode="suffix")
    assert notebook.fields == {"status": "pending"}


def test_the_model_is_not_in_it() -> None:
    notebook = build()
    weights = sum(each.nbytes for each in notebook.model.engine.model.parameters())
    assert len(pickle.dumps(notebook)) < min(weights, 4 * notebook.cache.nbytes + 40_000)


def test_copying_is_as_pickling() -> None:
    notebook = build()
    other = copy.deepcopy(notebook)
    assert other.model is notebook.model
    assert other.ids == notebook.ids


def _decide_elsewhere(notebook: Notebook) -> str:
    return notebook.decide("now?", ["cancel", "deny"]).choice


def test_another_process_with_the_model_reads_it() -> None:
    notebook = build()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_decide_elsewhere, (notebook,)) == _decide_elsewhere(notebook)


def test_a_model_that_is_not_loaded_is_asked_for() -> None:
    class Other:
        fingerprint = "a fingerprint of no model"

    other = Other()
    remember(other)
    assert loaded_model(other.fingerprint, Other, "other") is other
    with pytest.raises(ModelUnavailableError, match="load it"):
        loaded_model(other.fingerprint, Model, "other")  # an object that is not a model has this fingerprint
    del other
    gc.collect()
    with pytest.raises(ModelUnavailableError, match="load it"):
        loaded_model("a fingerprint of no model", Other, "other")


def test_the_registry_keeps_no_model_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("mine", tiny().tokenizer, tiny().engine, "a fingerprint of its own")
    body = pickle.dumps(build(model))
    assert pickle.loads(body).model is model
    del model
    gc.collect()
    with pytest.raises(ModelUnavailableError, match="'mine'"):
        pickle.loads(body)


@pytest.mark.parametrize("state", ["not prefilled", "streaming"])
def test_what_cannot_be_saved_cannot_be_pickled(state: str) -> None:
    notebook: Any = Notebook(tiny()).message("system", "x y z") if state == "not prefilled" else build()
    if state == "streaming":
        stream = notebook.generate("go on", max_new_tokens=5)
        next(stream)
    with pytest.raises((NotPrefilledError, OutOfStepError)):
        pickle.dumps(notebook)
