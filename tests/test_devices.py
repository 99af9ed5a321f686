"""The same operations on every device that torch has here are as exact as on the CPU, in float64 where possible.

On a machine without an accelerator this runs on the CPU alone. Nothing in the package names a device.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model, tokenizer
from programmable_kv import Mode, Notebook, SeamRepair, Skill, wrap_model
from programmable_kv.skills.store import SkillStore
from programmable_kv.states import TokenState

sys.path.insert(0, str(Path(__file__).parent / "design"))

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]
POLICY = (
    "order status: {status}\ntier: {tier}\nif the status is one then deny,\nif two cancel.\nthe tier gold may refund.\n"
)
SKILL = "refund policy:\nif returned then refund.\n"
FAMILIES = ["llama", "gemma3_text", "minicpm3"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model_on(device: str, family: str = "llama") -> Any:
    dtype = torch.float32 if device == "mps" else torch.float64
    network = copy.deepcopy(tiny_model(family, dtype=dtype)).to(device)
    return wrap_model(network, tokenizer("byte-level"), name=f"tiny {family} on {device}")


def build(model: Any, visibility: str = "causal", **values: str) -> Notebook:
    notebook = Notebook(model, visibility=visibility)
    notebook.message("system", POLICY, status=values.get("status", "shipped"), tier=values.get("tier", "gold"))
    notebook.message("user", "the customer asks to cancel")
    notebook.prefill()
    return notebook


def assert_equal(one: Notebook, two: Notebook, atol: float = 1e-5) -> None:
    assert one.ids == two.ids
    for layer in range(len(one.cache)):
        for name in ("keys", "values"):
            ours, theirs = (getattr(notebook.cache, name)(layer).cpu() for notebook in (one, two))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_that_of_the_cpu(device: str, family: str) -> None:
    notebook = build(model_on(device, family))
    assert notebook.cache.keys(0).device.type == device
    assert_equal(notebook, build(model_on("cpu", family)), atol=1e-3 if device == "mps" else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", ["pending", "cancelled by the customer"])
def test_a_suffix_edit_is_a_prefill_of_the_new_text(device: str, family: str, value: str) -> None:
    model = model_on(device, family)
    notebook = build(model)
    notebook.edit(status=value, mode="suffix")
    assert_equal(notebook, build(model, status=value))


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.STALE])
def test_every_mode_runs_and_a_recompute_mends_it(device: str, mode: Mode) -> None:
    model = model_on(device)
    notebook = build(model)
    notebook.edit(status="cancelled by the customer", mode=mode, k=4)
    notebook.rebase()
    notebook.recompute()
    assert set(notebook.states) == {TokenState.EXACT}
    assert_equal(notebook, build(model, status="cancelled by the customer"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", ["pending", "cancelled by the customer"])
def test_an_edit_by_design_is_a_prefill_of_the_new_text(device: str, family: str, value: str) -> None:
    from oracle import dense_mask, masked_forward, tokens_of

    notebook = build(model_on(device, family), "design")
    notebook.edit(status=value)
    assert set(notebook.states) == {TokenState.EXACT}
    mask = dense_mask(tokens_of(notebook, {"status": ["status"], "tier": ["tier"]}))
    network = model_on("cpu", family).engine.model
    layers, _ = masked_forward(network, notebook.ids, notebook.cache.positions.tolist(), mask)
    for layer, (keys, values) in enumerate(layers):
        atol = 1e-2 if device == "mps" else 1e-5
        torch.testing.assert_close(notebook.cache.keys(layer).cpu(), keys, rtol=0, atol=atol, check_dtype=False)
        torch.testing.assert_close(notebook.cache.values(layer).cpu(), values, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_skills_are_spliced_moved_and_cut(device: str, family: str) -> None:
    model = model_on(device, family)
    skill = Skill.compile(model, SKILL, name="refunds")
    notebook = build(model)
    before = notebook.fork()
    notebook.splice(skill, at=notebook.parts[-1], repair=SeamRepair(2))
    notebook.move("refunds", to=0)
    notebook.cut("refunds")
    assert_equal(notebook, before)
    notebook.splice(skill, at=0, repair=SeamRepair(len(skill)))
    notebook.recompute()
    assert set(notebook.states) <= {TokenState.EXACT, TokenState.REPAIRED}


def test_it_is_saved_loaded_and_stored(device: str, tmp_path: Path) -> None:
    model = model_on(device)
    notebook = build(model)
    notebook.edit(status="pending")
    notebook.save(tmp_path / "saved")
    loaded = Notebook.load(tmp_path / "saved", model)
    assert loaded.cache.keys(0).device.type == device
    assert_equal(loaded, notebook, atol=0)
    store = SkillStore(tmp_path / "skills")
    skill = Skill.compile(model, SKILL, name="refunds")
    store.put(skill)
    again = build(model)
    again.splice(store.get(model, "refunds"))
    other = build(model)
    other.splice(skill)
    assert_equal(again, other, atol=0)


def test_it_decides_and_generates(device: str) -> None:
    notebook, other = build(model_on(device)), build(model_on("cpu"))
    asked, known = (each.decide("what now?", ["deny", "cancel"]) for each in (notebook, other))
    atol = 1e-2 if device == "mps" else 1e-5
    assert asked.log_probabilities == pytest.approx(known.log_probabilities, abs=atol)
    drawn = "".join(notebook.generate("what now?", max_new_tokens=8))
    if device != "mps":
        assert drawn == "".join(other.generate("what now?", max_new_tokens=8))
