"""Fork, mark, save, load, generate, add, and the HTML view."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_edits import build

from conftest import tiny
from programmable_kv import Notebook
from programmable_kv.errors import (
    CacheBufferError,
    CorruptFileError,
    FingerprintMismatchError,
    NotPrefilledError,
    OutOfStepError,
)
from programmable_kv.notebook.html import COLOURS, ERRATUM_STYLE
from programmable_kv.states import TokenState, weakest
from reference import assert_rows_equal, assert_same, full_forward


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
    for each in (loaded, notebook):  # both continue alike, and relocate from the same origins
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
    with pytest.raises(FingerprintMismatchError):  # only one number in the configuration differs
        Notebook.load(tmp_path / "saved", tiny(rms_norm_eps=1e-3))


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


def test_an_open_stream_refuses_everything_else() -> None:
    notebook = build()
    length = len(notebook)
    stream = notebook.generate("go on", max_new_tokens=6)
    next(stream)
    for operation in (
        lambda: notebook.decide("now?", ["cancel", "deny"]),
        lambda: notebook.edit(status="pending"),
        lambda: notebook.add("user", "hi"),
        lambda: notebook.generate("go on"),
        notebook.fork,
    ):
        with pytest.raises(OutOfStepError, match="stream"):
            operation()
    stream.close()
    notebook.decide("now?", ["cancel", "deny"])
    assert notebook.cache.length == length


def test_a_stream_ends_when_the_notebook_is_rolled_back_under_it() -> None:
    notebook = build()
    mark = notebook.mark()
    stream = notebook.generate("go on", max_new_tokens=6)
    next(stream)
    notebook.rollback(mark)
    with pytest.raises(OutOfStepError, match="rolled back"):
        list(stream)
    assert notebook.cache.length == len(notebook)


def test_tokens_that_transformers_appended_are_noticed() -> None:
    notebook = build()
    model = notebook.model.engine.model
    mark = notebook.mark()
    ids = torch.tensor([[*notebook.ids, 5]])
    model.generate(ids, past_key_values=notebook.cache, max_new_tokens=2, do_sample=False, eos_token_id=None)
    with pytest.raises(OutOfStepError, match="transformers"):
        notebook.decide("now?", ["cancel", "deny"])
    notebook.rollback(mark)
    notebook.decide("now?", ["cancel", "deny"])


def test_another_notebooks_mark_is_refused() -> None:
    one, two = build(), build(status="pending")
    mark, _ = one.mark(), two.mark()
    with pytest.raises(CacheBufferError, match="not active"):
        two.rollback(mark)
    assert two.fields["status"] == "pending"


def test_every_operation_leaves_its_account(tmp_path: Path) -> None:
    notebook = build()
    assert notebook.last_account.tokens_computed == len(notebook)
    mark = notebook.mark()
    list(notebook.generate("go on", max_new_tokens=4))
    assert notebook.last_account.tokens_computed >= 4
    assert notebook.last_account.tokens_reused == len(notebook)
    notebook.edit(status="cancelled by the customer", mode="in_place")
    assert notebook.rollback(mark).bytes_moved > 0
    fork = notebook.fork()
    assert fork.last_account.bytes_moved == notebook.cache.nbytes
    notebook.save(tmp_path / "saved")
    assert notebook.last_account.bytes_moved == notebook.cache.nbytes
    assert Notebook.load(tmp_path / "saved", tiny()).last_account.bytes_moved == notebook.cache.nbytes


def test_an_answer_with_markers_is_kept_as_it_was_said() -> None:
    """The model's own answer is not a value from outside: it is not refused, and no half of a turn is left behind."""
    notebook = build()
    notebook._append_turn("assistant", "### <done>")
    assert notebook.rendered_text.endswith("### <done><|im_end|>\n")


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
    notebook.edit(note="<i>y</i>", mode="field_erratum")
    page = notebook._repr_html_()
    assert "<i>y" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page.replace("</span>", "").replace(
        '<span style="background:#f3f3f3" title="exact">', ""
    )
    for state in (TokenState.EXACT, TokenState.STALE, TokenState.AFTER_EDIT):
        assert COLOURS[state] in page
    assert ERRATUM_STYLE in page


def test_joining_spans_takes_the_weakest() -> None:
    order = list(TokenState)
    for i, one in enumerate(order):
        for j, two in enumerate(order):
            assert weakest([one, two]) is order[max(i, j)]
    assert weakest([]) is TokenState.EXACT
    assert order[0] is TokenState.EXACT
    assert order[-1] is TokenState.STALE


def test_of_two_streams_the_second_is_refused_when_it_begins() -> None:
    notebook = build()
    one, two = notebook.generate("a", max_new_tokens=6), notebook.generate("b", max_new_tokens=6)
    first = next(one)
    with pytest.raises(OutOfStepError, match="still open"):
        next(two)
    alone = "".join([first, *one])
    assert alone == "".join(notebook.generate("a", max_new_tokens=6))


def test_a_mark_is_not_released_under_a_stream() -> None:
    notebook = build()
    mark = notebook.mark()
    stream = notebook.generate("a", max_new_tokens=6)
    next(stream)
    with pytest.raises(OutOfStepError, match="still open"):
        notebook.release(mark)
    list(stream)
    notebook.release(mark)
    notebook.add("user", "so?")


def test_asking_of_the_context_as_it_is_leaves_its_last_token_alone() -> None:
    """Its logits come from recomputing it under the current values; afterwards its cached rows are restored."""
    notebook = Notebook(tiny()).text("status: {status}. cancel or deny", status="pending")
    notebook.prefill()
    exact = notebook.cache.keys(1).clone()
    notebook.edit(status="shipped", mode="in_place")
    notebook.decide(options=["cancel", "deny"])
    notebook.edit(status="pending", mode="in_place")
    assert set(notebook.states) == {TokenState.EXACT}
    torch.testing.assert_close(notebook.cache.keys(1), exact, rtol=0, atol=1e-9)


def test_a_value_that_was_edited_away_is_not_saved(tmp_path: Path) -> None:
    notebook = Notebook(tiny()).message("system", "address: {address}. agent.", address="elm street nine")
    notebook.prefill()
    notebook.edit(address="removed", mode="full")
    notebook.save(tmp_path / "saved")
    assert "elm street" not in (tmp_path / "saved" / "notebook.json").read_text(encoding="utf-8")
    loaded = Notebook.load(tmp_path / "saved", notebook.model)
    for each in (notebook, loaded):
        each.add("user", "so?")
    assert_same(notebook, loaded)
