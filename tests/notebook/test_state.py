"""Fork, mark, save, load, generate, add, and the HTML view."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_edits import build

from conftest import tiny
from programmable_kv import Notebook
from programmable_kv.errors import CorruptFileError, FingerprintMismatchError, NotPrefilledError
from programmable_kv.notebook.context import TokenState, weakest
from programmable_kv.notebook.html import COLOURS
from reference import assert_rows_equal, full_forward


def assert_same(one: Notebook, two: Notebook) -> None:
    assert one.ids == two.ids
    assert one.fields == two.fields
    assert one.states == two.states
    assert one.rendered_text == two.rendered_text
    for layer in range(len(one.cache)):
        assert torch.equal(one.cache.keys(layer), two.cache.keys(layer))
        assert torch.equal(one.cache.values(layer), two.cache.values(layer))


def test_a_fork_lives_its_own_life() -> None:
    notebook = build()
    before, fork = notebook.fork(), notebook.fork()
    fork.edit(status="cancelled by the customer")
    fork.add("user", "hello")
    assert_same(notebook, before)
    assert fork.fields["status"] != notebook.fields["status"]


def test_rollback_returns_everything() -> None:
    notebook = build()
    before = notebook.fork()
    mark = notebook.mark()
    notebook.edit(status="cancelled by the customer", mode="selective", k=3)
    notebook.add("user", "hello")
    notebook.edit(status="pending", mode="suffix")
    notebook.rollback(mark)
    assert_same(notebook, before)


def test_save_and_load(tmp_path: Path) -> None:
    notebook = build()
    notebook.edit(status="cancelled by the customer", mode="selective", k=3)
    notebook.add("user", "and now?")
    notebook.edit(tier="silver")
    notebook.save(tmp_path / "saved")
    loaded = Notebook.load(tmp_path / "saved", tiny())
    assert_same(loaded, notebook)
    for each in (loaded, notebook):  # and they go on alike, relocations from the same origins included
        each.edit(status="x")
    assert_same(loaded, notebook)
    loaded.save(tmp_path / "saved")
    assert_same(Notebook.load(tmp_path / "saved", tiny()), notebook)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"], "nothing half-written is left behind"


def test_another_model_is_refused(tmp_path: Path) -> None:
    build().save(tmp_path / "saved")
    with pytest.raises(FingerprintMismatchError, match="tiny llama"):
        Notebook.load(tmp_path / "saved", tiny("qwen2"))
    with pytest.raises(FingerprintMismatchError):
        Notebook.load(tmp_path / "saved", tiny(dtype=torch.float32))
    with pytest.raises(FingerprintMismatchError):
        Notebook.load(tmp_path / "saved", tiny(rope_theta=5000.0))


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "manifest", "version", "no manifest"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    folder = build().save(tmp_path / "saved")
    tensors, manifest = folder / "cache.safetensors", folder / "notebook.json"
    if damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(bytes(content))
    elif damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-40])
    elif damage == "version":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    else:
        manifest.unlink()
    with pytest.raises(CorruptFileError):
        Notebook.load(folder, tiny())


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(CorruptFileError, match="not a saved notebook"):
        build().save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_saving_before_prefill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotPrefilledError):
        Notebook(tiny()).message("system", "x y z").save(tmp_path / "saved")


def test_generate_is_greedy_and_taken_back() -> None:
    notebook = build()
    length = len(notebook)
    said = "".join(notebook.generate("go on", max_new_tokens=6))
    assert len(notebook) == notebook.cache.length == length
    assert "".join(notebook.generate("go on", max_new_tokens=6)) == said
    stream = notebook.generate("go on", max_new_tokens=6)
    next(stream)
    stream.close()
    assert notebook.cache.length == length
    sampled = ["".join(notebook.generate("go on", max_new_tokens=6, temperature=5.0, seed=s)) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_kept_turns_equal_a_prefill_of_the_conversation() -> None:
    notebook = build()
    said = "".join(notebook.generate("go on", max_new_tokens=5, keep=True))
    assert notebook.rendered_text.endswith(f"<|im_start|>assistant\n{said}<|im_end|>\n")
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)


def test_transformers_generate_takes_the_cache() -> None:
    notebook = build()
    model = notebook.model.engine.model
    prompt = notebook.model.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    ids = torch.tensor([[*notebook.ids, *prompt]])
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **arguments)
    mark = notebook.mark()
    assert model.generate(ids, past_key_values=notebook.cache, **arguments).tolist() == expected.tolist()
    notebook.rollback(mark)
    assert notebook.cache.length == len(notebook)


def test_html_shows_every_token_and_escapes() -> None:
    notebook = Notebook(tiny()).message("system", "a <b>bold</b> note: {note} & reply", note="x")
    assert "not prefilled" in notebook._repr_html_()
    notebook.prefill()
    notebook.edit(note="<i>y</i>")
    page = notebook._repr_html_()
    assert "<i>y" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page.replace("</span>", "").replace(
        '<span style="background:#f3f3f3" title="exact">', ""
    )
    for state in (TokenState.EXACT, TokenState.STALE, TokenState.ERRATUM, TokenState.REFRESHED):
        assert COLOURS[state] in page


def test_joining_spans_takes_the_weakest() -> None:
    order = list(TokenState)
    for i, one in enumerate(order):
        for j, two in enumerate(order):
            assert weakest([one, two]) is order[max(i, j)]
    assert weakest([]) is TokenState.EXACT
    assert order[0] is TokenState.EXACT
    assert order[-1] is TokenState.STALE
