"""A notebook under `visibility="design"` is saved, forked, shown and continued by an agent; and what it refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from oracle import dense_mask, layers_of, masked_forward, tokens_of
from test_exact import SKILLS, assert_truthful, build

from conftest import tiny, with_beginning
from programmable_kv import Agent, Notebook, SeamRepair, Skill
from programmable_kv.errors import CacheBufferError, CorruptFileError, InvalidArgumentError, InvalidEditError
from programmable_kv.prompt.readers import Why
from programmable_kv.states import TokenState
from programmable_kv.storage.seal import opened
from reference import assert_rows_equal, assert_same, largest_difference


def test_save_load_and_pickle_keep_it(tmp_path: Path) -> None:
    notebook = build(tiny())
    notebook.mentions("status", "polite")
    notebook.decide(options=["deny", "cancel"], keep=True)
    notebook.edit(status="cancelled by the customer")
    notebook.save(tmp_path / "saved")
    for loaded in (Notebook.load(tmp_path / "saved", notebook.model), pickle.loads(pickle.dumps(notebook))):
        assert loaded.visibility == "design"
        assert_same(loaded, notebook)
        account = loaded.edit(status="x")
        other = notebook.fork()
        assert account.tokens_computed == other.edit(status="x").tokens_computed
        assert_same(loaded, other)


@pytest.mark.parametrize("harm", ["build", "both", "width"])
def test_a_damaged_build_is_refused(tmp_path: Path, harm: str) -> None:
    notebook = build(tiny())
    notebook.save(tmp_path / "saved")
    path = tmp_path / "saved" / "notebook.json"
    manifest = json.loads(opened(path.read_bytes()) or b"")
    match harm:
        case "build":
            manifest["build"]["built"].pop()
        case "both":
            manifest["build"] = None
        case "width":
            next(unit for unit in manifest["context"]["units"] if unit["width"])["width"] += 1
    from programmable_kv.storage.manifests import NotebookManifest

    manifest.pop("digest", None)
    sealed = NotebookManifest.model_validate_json(
        json.dumps({k: v for k, v in manifest.items() if k != "sha256"})
    ).sealed()
    path.write_bytes(sealed)
    with pytest.raises(CorruptFileError):
        Notebook.load(tmp_path / "saved", notebook.model)


@pytest.mark.parametrize("mode", ["stale", "in_place", "erratum", "field_erratum", "selective"])
def test_a_mode_that_would_not_be_exact_is_refused(mode: str) -> None:
    notebook = build(tiny())
    before = notebook.fork()
    with pytest.raises(InvalidEditError, match="under visibility='design' an edit is exact"):
        notebook.edit(status="pending", mode=mode)
    assert_same(notebook, before)


@pytest.mark.parametrize("mode", ["readers", "suffix", "full"])
def test_the_others_are_exact(mode: str) -> None:
    notebook = build(tiny())
    notebook.decide(options=["deny", "cancel"], keep=True)
    account = notebook.edit(status="pending", mode=mode)
    assert (TokenState.STALE in notebook.states) is (mode == "readers")
    assert (account.tokens_computed == len(notebook)) is (mode == "full")
    assert_truthful(notebook)


def test_there_is_no_such_visibility() -> None:
    with pytest.raises(InvalidArgumentError, match="causal, design"):
        Notebook(tiny(), visibility="blind")


def test_there_is_no_seam_to_repair() -> None:
    model = tiny()
    skill = Skill.compile(model, SKILLS["refunds"], name="refunds")
    with pytest.raises(InvalidEditError, match="no seam"):
        build(model).splice(skill, repair=SeamRepair(4))
    notebook = Notebook(model, visibility="design").text("{refunds}", refunds=skill)
    with pytest.raises(InvalidEditError, match="no seam"):
        notebook.prefill(repair=SeamRepair(4))
    notebook.prefill(repair=SeamRepair(0))


@pytest.mark.parametrize(
    "preface", ["", "be polite.\nask the customer.\n", None], ids=["alone", "preface", "beginning"]
)
def test_a_field_in_a_skill_is_edited_there(preface: str | None) -> None:
    """The skill is compiled again after the text that it read when it was compiled, which is not in the notebook."""
    text = "the date is {date}.\nask when the date is near.\n"
    model = with_beginning(tiny()) if preface is None else tiny()
    skill = Skill.compile(model, text, date="2026", name="dates", preface=preface or "")
    assert bool(skill.preface_ids) is (preface != "")
    notebook = Notebook(model, visibility="design").message("system", "be polite.\n{dates}", dates=skill)
    notebook.message("user", "ask").prefill()
    planned = notebook.plan.edit(date="2027")
    account = notebook.edit(date="2027")
    assert account.tokens_computed == planned.tokens_computed
    assert set(notebook.states) == {TokenState.EXACT}
    assert_rows_equal(notebook.cache, layers_of(notebook, {"date": ["date"]}), range(len(notebook)), atol=1e-5)
    if skill.preface_ids:  # the preface that it had read matters
        without = masked_forward(
            model.engine.model, notebook.ids, notebook.cache.positions.tolist(),
            dense_mask(tokens_of(notebook, {"date": ["date"]})),
        )[0]  # fmt: skip
        assert largest_difference(notebook.cache, without, [notebook.part("dates").span.stop - 1]) > 1e-3
    fresh = Skill.compile(model, text, date="2027", name="dates", preface=preface or "")
    other = Notebook(model, visibility="design").message("system", "be polite.\n{dates}", dates=fresh)
    other.message("user", "ask").prefill()
    assert other.ids == notebook.ids


def test_a_skill_of_another_preface_is_not_exact_in_the_place_of_one() -> None:
    model = tiny()
    alone, behind = (
        Skill.compile(model, SKILLS["dates"], name="dates", preface=preface) for preface in ("", "be polite.")
    )
    notebook = build(model)
    notebook.splice(behind, at=notebook.parts[-1])
    assert set(notebook.states) == {TokenState.EXACT}, "what a skill reads is what it was compiled behind"
    ids = notebook.ids
    notebook.replace("dates", alone)
    assert notebook.ids == ids
    assert set(notebook.states) == {TokenState.EXACT}


def test_readers_are_what_an_edit_computes() -> None:
    notebook = build(tiny())
    found = notebook.readers("status")
    computed = {slot for one in notebook.plan.edit(status="pending").compute for slot in one.span.range}
    own = {slot for span in notebook.spans("status") for slot in span.range}
    assert {slot for reader in found for slot in reader.span.range} | own >= computed
    assert {reader.why for reader in found} == {Why.READS, Why.OPEN}
    assert any("tier decides" in reader.text for reader in found)
    assert not any("gold may" in reader.text for reader in found)


def test_suggesting_readers_needs_a_causal_notebook() -> None:
    with pytest.raises(InvalidEditError, match="visibility='causal'"):
        build(tiny()).suggest_readers("status", "pending")


def test_an_agent_keeps_its_context_as_long_as_its_turns() -> None:
    agent = Agent(tiny(), "status: {status}\nif the status is one then deny.\n", status="shipped", visibility="design")
    first = agent.act("what now?", ["deny", "cancel"])
    length = len(agent.notebook)
    second = agent.act("and now?", ["deny", "cancel"], status="pending")
    assert second.account.mode_used == "readers"
    assert not any(part.kind == "erratum" for part in agent.notebook.parts)
    assert len(agent.notebook) - length <= length
    assert "history" in second.account.why
    assert first.decision.choice in ("deny", "cancel")


def test_a_field_in_a_turn_is_read_by_all_that_follows() -> None:
    notebook = Notebook(tiny(), visibility="design")
    notebook.message("system", "be polite.\n").message("user", "hello").message("assistant", "hello")
    notebook.message("user", "the order is {status}. what now?", status="shipped").prefill()
    notebook.edit(status="pending")
    assert set(notebook.states) == {TokenState.EXACT}


def test_it_is_shown() -> None:
    notebook = build(tiny())
    assert "shipped" in notebook._repr_html_()
    notebook.rebase()
    assert notebook.last_account.tokens_computed == 0


def test_transformers_own_generate_is_refused_where_positions_are_kept_free() -> None:
    notebook = build(tiny())
    before = notebook.fork()
    ids = torch.tensor([[*notebook.ids, 5]])
    with pytest.raises(CacheBufferError, match="wrong positions"):
        notebook.model.engine.model(input_ids=ids[:, -1:], past_key_values=notebook.cache, use_cache=True)
    assert_same(notebook, before)
    notebook.edit(status="pending")
