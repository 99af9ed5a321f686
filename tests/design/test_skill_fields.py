"""Skills with fields, compiled with `visibility="design"`: lines inside and outside a skill read what they mention.

Compared with the oracle in float64, an edit computes the value and its readers, wherever they stand, and all is exact.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import OWN, dense_mask, layers_of, masked_forward, tokens_of

from conftest import tiny, with_beginning
from programmable_kv import Field, Notebook, Skill, SkillStore
from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidArgumentError, InvalidEditError, UnknownFieldError
from programmable_kv.prompt.readers import Why
from programmable_kv.states import TokenState
from reference import assert_rows_equal, largest_difference

SHIPPING = (
    "shipping policy.\nthe zone is {zone}.\nbe quick.\nfor zone one ask first.\nfor two refund.\n"
    "the carrier: {carrier}\nreply only.\ncarrier gold may be late.\nno more than that.\n"
)
ZONES = ["one", "two", "far away beyond the sea"]
CARRIERS = ["gold", "silver and gold", "", "x"]
TEXT = "order status: {status}\nbe polite.\nif the status is one then deny.\n{shipping}reply only.\n"
WORDS = {"status": ["status"], "zone": ["zone"], "carrier": ["carrier"]}


def shipping(model: Any, **changed: Any) -> Skill:
    values = {"zone": "one", "carrier": Field("gold", kind="block"), **changed}
    return Skill.compile(model, SHIPPING, name="shipping", visibility="design", **values)


def build(model: Any, skill: Skill | None = None) -> Notebook:
    notebook = Notebook(model, visibility="design")
    notebook.message("system", TEXT, status="shipped", shipping=skill or shipping(model)).message("user", "refund?")
    notebook.prefill()
    return notebook


def assert_all_exact(notebook: Notebook, words: dict[str, list[str]] = WORDS, atol: float = 1e-5) -> None:
    assert set(notebook.states) == {TokenState.EXACT}
    known = {name: words[name] for name in words if name in notebook.fields}
    assert_rows_equal(notebook.cache, layers_of(notebook, known), range(len(notebook)), atol=atol)


def test_compiled_alone_it_is_the_one_prefilled_in_place(model_type: str) -> None:
    model = tiny(model_type)
    notebook = build(model)
    account = notebook.last_account
    assert account.tokens_computed == len(notebook) - len(shipping(model)), "nothing of the skill was computed here"
    assert_all_exact(notebook, atol=2e-4 if model_type == "gemma2" else 1e-5)


def test_its_lines_do_not_read_what_they_do_not_mention() -> None:
    """If every token of the skill read all before it, the result would differ: the mask inside the skill matters."""
    notebook = build(tiny())
    plain = [replace(token, kind="text") if token.scope != OWN else token for token in tokens_of(notebook, WORDS)]
    positions = notebook.cache.positions.tolist()
    layers, _ = masked_forward(notebook.model.engine.model, notebook.ids, positions, dense_mask(plain))
    last = notebook.part("shipping").span.stop - 1
    assert largest_difference(notebook.cache, layers, [last]) > 1e-3


@pytest.mark.parametrize("zone", ZONES[1:])
def test_an_edit_computes_the_value_and_its_readers_in_the_skill(model_type: str, zone: str) -> None:
    notebook = build(tiny(model_type))
    part = notebook.part("shipping")
    before = notebook.fork()
    planned = notebook.plan.edit(zone=zone)
    account = notebook.edit(zone=zone)
    assert_all_exact(notebook, atol=2e-4 if model_type == "gemma2" else 1e-5)
    assert notebook.fields["zone"] == zone
    assert account.tokens_computed == planned.tokens_computed
    if "grew" not in account.why:  # the value fits its room, so what follows is not moved
        readers = [t for t in tokens_of(notebook, WORDS) if t.kind == "turn" or "zone" in t.fields]
        assert account.tokens_computed == len(readers) < len(part.span)
        ends = (before.cache.positions[-1], notebook.cache.positions[-1])
        assert ends[0] == ends[1]


def test_a_value_that_outgrows_its_room_moves_what_follows_and_is_exact() -> None:
    notebook = build(tiny())
    account = notebook.edit(zone="far away beyond the sea and the hills behind it, where no ship goes")
    assert "grew" in account.why
    assert_all_exact(notebook)


def test_readers_of_a_field_are_listed_inside_the_skill() -> None:
    notebook = build(tiny())
    found = {reader.text.strip(): reader.why for reader in notebook.readers("zone")}
    assert found["for zone one ask first."] is Why.READS
    assert "for two refund." not in found
    assert all("status" not in text for text in found)


def test_it_is_one_part_with_one_name_and_moves_as_a_whole() -> None:
    notebook = build(tiny())
    parts = [part for part in notebook.parts if part.name == "shipping"]
    assert len(parts) == 1
    assert parts[0].text == SHIPPING.format(zone="one", carrier="gold")
    ids, places = notebook.ids, parts[0].span.start
    account = notebook.move("shipping", to=0)
    assert account.tokens_computed <= len(notebook) - len(parts[0].span)
    assert_all_exact(notebook)
    notebook.move("shipping", to=places + len(parts[0].span))
    assert notebook.ids == ids
    assert notebook.cut("shipping").tokens_computed < len(notebook)
    assert "zone" not in notebook.fields
    assert_all_exact(notebook)
    notebook.splice(shipping(notebook.model), at=places)
    assert notebook.ids == ids
    assert_all_exact(notebook)


def test_exchanged_for_one_with_other_values() -> None:
    notebook = build(tiny())
    account = notebook.replace("shipping", shipping(notebook.model, zone="two"))
    assert notebook.fields["zone"] == "two"
    assert account.tokens_computed < len(notebook) / 2
    assert_all_exact(notebook)


def test_the_same_field_outside_and_inside_is_edited_in_both() -> None:
    model = tiny()
    notebook = Notebook(model, visibility="design")
    skill = shipping(model)
    notebook.message("system", "zone: {zone}\nask about the zone.\n{shipping}", zone="one", shipping=skill)
    notebook.message("user", "late?").prefill()
    assert_all_exact(notebook)
    notebook.edit(zone="two")
    assert notebook.rendered_text.count("two") == 3
    assert_all_exact(notebook)


def test_words_declared_when_it_was_compiled_come_along() -> None:
    model = tiny()
    skill = Skill.compile(
        model, SHIPPING, name="shipping", visibility="design", mentions={"zone": ["two"]}, zone="one", carrier="gold"
    )
    notebook = Notebook(model, visibility="design")
    notebook.message("system", TEXT + "of two, none.\n", status="shipped", shipping=skill).message(
        "user", "?"
    ).prefill()
    words = {**WORDS, "zone": ["zone", "two"]}
    assert_all_exact(notebook, words)
    assert any(reader.text.startswith("for two") for reader in notebook.readers("zone"))
    notebook.edit(zone="x")
    assert_all_exact(notebook, words)
    other = Notebook(model, visibility="design").message("system", "hello.\n").message("user", "late?")
    other.prefill()
    other.splice(skill, at=0)
    assert any(reader.text.startswith("for two") for reader in other.readers("zone"))
    assert_all_exact(other, words)


def test_words_declared_here_make_its_lines_stale_until_they_are_built_again() -> None:
    notebook = build(tiny())
    notebook.mentions("zone", "two")
    assert TokenState.STALE in notebook.states
    notebook.recompute()
    assert_all_exact(notebook, {**WORDS, "zone": ["zone", "two"]})


def test_saved_loaded_forked_and_rolled_back(tmp_path: Path) -> None:
    model = tiny()
    notebook = build(model)
    mark = notebook.mark()
    notebook.edit(zone="two")
    notebook.save(tmp_path)
    loaded = Notebook.load(tmp_path, model)
    loaded.edit(carrier="x")
    assert_all_exact(loaded)
    assert loaded.part("shipping").text == SHIPPING.format(zone="two", carrier="x")
    fork = notebook.fork()
    fork.edit(zone="far away", carrier="")
    assert_all_exact(fork)
    notebook.rollback(mark)
    assert notebook.fields["zone"] == "one"
    assert_all_exact(notebook)


@pytest.mark.parametrize("int8", [False, True])
def test_kept_in_a_store(tmp_path: Path, int8: bool) -> None:
    model = tiny()
    store = SkillStore(tmp_path, int8=int8)

    def compiled(**options: Any) -> Skill:
        return store.compile(model, SHIPPING, name="shipping", zone="one", carrier="gold", **options)

    first = compiled(visibility="design")
    assert compiled().visibility == "causal"
    assert compiled(visibility="design", mentions={"zone": ["two"]}).mentions == {"zone": ("two",)}
    assert len(store.entries()) == 3, "they are three different skills"
    again = compiled(visibility="design")
    assert first.account.tokens_computed
    assert not again.account.tokens_computed
    kept = next(entry for entry in store.entries() if entry.pieces and not entry.mentions)
    stored = store.get(model, kept.key)
    assert stored.placed == again.placed == first.placed
    notebook = build(model, stored)
    if int8:
        assert set(notebook.states) >= {TokenState.RELOCATED}
        assert TokenState.STALE not in notebook.states
        notebook.edit(zone="two")
        assert TokenState.STALE not in notebook.states
        return
    assert_all_exact(notebook)


def test_refused_where_it_has_no_meaning() -> None:
    model = tiny()
    causal = Notebook(model).message("system", "hello.\n").message("user", "late?")
    causal.prefill()
    ids = causal.ids
    with pytest.raises(InvalidEditError, match="reads causally"):
        causal.splice(shipping(model), at=0)
    assert causal.ids == ids
    with pytest.raises(InvalidEditError, match="reads causally"):
        Notebook(model).message("system", TEXT, status="x", shipping=shipping(model)).prefill()
    with pytest.raises(InvalidArgumentError, match="visibility is one of"):
        Skill.compile(model, SHIPPING, zone="one", carrier="x", visibility="all")
    with pytest.raises(InvalidArgumentError, match="omit them"):
        Skill.compile(model, SHIPPING, zone="one", carrier="x", mentions={"zone": ["two"]})
    with pytest.raises(UnknownFieldError, match="not a field of this skill"):
        Skill.compile(model, SHIPPING, zone="one", carrier="x", visibility="design", mentions={"zoo": ["two"]})
    with pytest.raises(InvalidArgumentError, match="letters or digits"):
        Skill.compile(model, SHIPPING, zone="one", carrier="x", visibility="design", mentions={"zone": ["--"]})


OPERATIONS = st.one_of(
    st.tuples(st.just("edit"), st.sampled_from(["zone", "carrier", "status"]), st.integers(0, 4)),
    st.tuples(st.just("move"), st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.just("cut"), st.integers(0, 20)),
    st.tuples(st.just("splice"), st.integers(0, 20)),
    st.tuples(st.just("splice anywhere"), st.integers(0, 200)),
    st.tuples(st.just("cut anywhere"), st.integers(0, 200), st.integers(1, 12)),
    st.tuples(st.just("keep")),
    st.tuples(st.just("mention"), st.sampled_from(["zone", "carrier"]), st.sampled_from(["refund", "quick", "two"])),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    program=st.lists(OPERATIONS, max_size=6),
    model_type=st.sampled_from(["llama", "gemma3_text"]),
    beginning=st.booleans(),
)
def test_whatever_is_done_what_is_called_exact_is(
    program: list[tuple[Any, ...]], model_type: str, beginning: bool
) -> None:
    """This includes skills that were compiled after the tokenizer's beginning-of-text token."""
    model = with_beginning(tiny(model_type)) if beginning else tiny(model_type)
    between = Skill.compile(model, "ask the zone.\n", name="between")
    notebook = build(model)
    words = {name: list(known) for name, known in WORDS.items()}
    choices = {"zone": ZONES, "carrier": CARRIERS, "status": ["shipped", "pending of the zone"]}
    for operation, *arguments in program:
        parts = notebook.parts
        places = [*(part.span.start for part in parts), len(notebook)]
        match operation:
            case "edit" if arguments[0] in notebook.fields:
                notebook.edit({arguments[0]: choices[arguments[0]][arguments[1] % len(choices[arguments[0]])]})
            case "move" if parts[arguments[0] % len(parts)].kind == "skill":
                notebook.move(parts[arguments[0] % len(parts)], to=places[arguments[1] % len(places)])
            case "cut" if parts[arguments[0] % len(parts)].kind == "skill":
                notebook.cut(parts[arguments[0] % len(parts)])
            case "splice" if not {"zone", "carrier"} & notebook.fields.keys():
                notebook.splice(shipping(model), at=places[arguments[0] % len(places)])
            case "splice anywhere" if not any(part.name == "between" for part in parts):
                with suppress(InvalidEditError):  # a slot inside a value or a character
                    notebook.splice(between, at=arguments[0] % (len(notebook) + 1))
            case "cut anywhere":
                turns = min(part.span.start for part in parts if part.kind == "turn")
                start = arguments[0] % turns
                with suppress(InvalidEditError):
                    notebook.cut(Span(start, min(start + arguments[1], turns)))
            case "keep":
                notebook.decide("refund?", ["deny", "cancel"], keep=True)
            case "mention" if arguments[0] in notebook.fields:
                notebook.mentions(*arguments)
                words[arguments[0]].append(arguments[1])
        known = {name: said for name, said in words.items() if name in notebook.fields}
        exact = [slot for slot, state in enumerate(notebook.states) if state is TokenState.EXACT]
        # transformers computes the rotation's angles in float32, so keys that were moved several times differ by about 1e-5.
        assert_rows_equal(notebook.cache, layers_of(notebook, known), exact, atol=4e-5)
    notebook.recompute()
    assert set(notebook.states) == {TokenState.EXACT}
