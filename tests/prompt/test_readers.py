"""Which text counts as a reader of a field: lines by what they mention, turns by their place. Uses no model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML, tokenizer
from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.prompt.chat import render_chat
from programmable_kv.prompt.context import Context, FieldValue
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.parts import Message, Rendered, Text, unmark
from programmable_kv.prompt.readers import (
    Reader,
    Turns,
    Why,
    check_words,
    declared_words,
    joined,
    later_lines,
    parse_turns,
    readers_of,
)
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.prompt.turns import TurnSlots, turn_slots
from programmable_kv.prompt.units import Kind, tokenised

TOKENIZER = tokenizer("byte-level")
FIELDS = {"status": FieldValue("shipped", "shipped")}


def context(text: str, *turns: str) -> Context:
    """A context of raw text, in which `{status}` is the field, with turns after it."""
    marked = text.replace("{status}", "\ue000status\ue001shipped\ue002")
    made = Context((), FIELDS).appended(tokenised(TOKENIZER, unmark(marked), Kind.PREFILL))
    return made.appended(*(tokenised(TOKENIZER, Rendered(turn), Kind.TURN) for turn in turns))


def found(made: Context, *words: str, turns: Turns = Turns.KEEP) -> list[tuple[str, str]]:
    """(text, reason) of every reader."""
    readers = readers_of(made, "status", words, turns, turn_slots(made, None, "status"))
    for reader in readers:
        assert TOKENIZER.decode(made.ids_in(reader.span)) == reader.text
    return [(reader.text, reader.reason) for reader in readers]


def chat(*messages: tuple[str, str]) -> tuple[Context, Conversation]:
    said = tuple(Message(role, Text(text, ("status",) * ("{status}" in text))) for role, text in messages)
    rendered = render_chat(ChatTemplate(TOKENIZER), said, {"status": "shipped"})
    unit = tokenised(TOKENIZER, rendered, Kind.PREFILL)
    return Context((unit,), FIELDS), Conversation(ChatTemplate(TOKENIZER), said, {"status": "shipped"})


def open_text(made: Context, conversation: Conversation | None) -> str:
    start = turn_slots(made, conversation, "status").open
    return str(TOKENIZER.decode(made.ids[start:]))


@pytest.mark.parametrize(
    ("line", "words", "reads"),
    [
        ("if status is gold, deny.", (), True),
        ("Status: ask.", (), True),
        ("if the status, deny", (), True),
        ("if statuses differ, deny.", (), False),
        ("if order_status is gold, deny.", (), False),
        ("for group a: deny", (), False),
        ("for Group  A: deny", ("group a",), True),
        ("for groups: deny", ("group",), False),
        ("a parcel on its way stays", ("on its way",), True),
        ("order status decides", ("order_status",), True),
        ("order_status decides", ("order status",), True),
        ("若订单状态为已发货则拒绝", ("订单状态",), True),
        ("(c++) is what it says", ("c++",), True),
        ("be polite", ("polite?",), False),
    ],
)
def test_a_line_reads_what_it_mentions(line: str, words: tuple[str, ...], reads: bool) -> None:
    made = context(f"status: {{status}}\nbefore\n{line}\nafter\n")
    lines = [text for text, _ in found(made, *words)]
    assert lines == (["\n", f"{line}\n"] if reads else ["\n"])


def test_each_reader_says_why() -> None:
    made = context("about status\nthe status {status} now.\nif status: a\nbe brief\nkind one: b\nit is {status}.\n")
    assert found(made, "kind one") == [
        (" now.\n", "holds the field"),
        ("if status: a\n", "mentions 'status'"),
        ("kind one: b\n", "mentions 'kind one'"),
        ("it is shipped.\n", "holds the field"),
    ], "nothing before the field has read it, and a line is given once"
    assert found(made, "be brief", "one:\nit")[2:] == [
        ("be brief\n", "mentions 'be brief'"),
        ("it is shipped.\n", "holds the field"),
    ]
    assert ("kind one: b\nit is shipped.\n", "mentions 'b it'") in found(made, "b it"), "a mark may cross a line's end"


def test_a_field_that_has_no_place_has_no_readers() -> None:
    made = Context((), FIELDS).appended(tokenised(TOKENIZER, Rendered("if status is x\n"), Kind.PREFILL))
    assert readers_of(made, "status", (), Turns.OPEN, TurnSlots(0, 0)) == ()


def test_turns_of_raw_text() -> None:
    """The last turn is the open question. Earlier turns are history, even if they mention the field."""
    made = context("status: {status}\nbe polite\n", "status?\n", "ok\n")
    history = [("\n", "holds the field")]
    assert found(made) == history
    assert found(made, turns=Turns.OPEN) == [*history, ("ok\n", "the open question")]
    assert found(made, turns=Turns.ALL) == [*history, ("status?\nok\n", "the turns")]
    unasked = context("status: {status}\nbe polite\nAction:\n\n")
    assert found(unasked, turns=Turns.OPEN) == [*history, ("Action:\n\n", "the open question")]
    assert found(context("status: {status}"), turns=Turns.OPEN) == []


@pytest.mark.parametrize(
    ("messages", "open_from"),
    [
        ([("system", "status {status}.")], None),
        ([("system", "status {status}."), ("user", "cancel?")], 1),
        ([("system", "status {status}."), ("system", "be brief"), ("user", "cancel?")], 2),
        ([("system", "status {status}."), ("user", "hi"), ("assistant", "ok"), ("user", "a"), ("tool", "b")], 3),
        ([("system", "status {status}."), ("user", "hi"), ("assistant", "ok")], None),
        ([("user", "status {status}."), ("assistant", "ok"), ("user", "cancel?")], 2),
        ([("user", "hi"), ("assistant", "ok"), ("user", "it is {status}"), ("user", "so?")], 3),
    ],
)
def test_the_open_question_of_a_chat(messages: list[tuple[str, str]], open_from: int | None) -> None:
    made, conversation = chat(*messages)
    expected = "" if open_from is None else chat(*messages[open_from:])[0].text
    assert open_text(made, conversation) == expected


def test_a_question_that_holds_the_field_is_open_in_its_last_line() -> None:
    made, conversation = chat(("user", "status {status}\nbe brief\nwhat now?"))
    assert open_text(made, conversation) == "what now?<|im_end|>\n"


def test_errata_and_skills_in_between_do_not_hide_the_question() -> None:
    made, conversation = chat(("system", "status {status}."), ("user", "hi"))
    erratum = tokenised(TOKENIZER, Rendered("tier is now: x.\n"), Kind.ERRATUM, corrects=(("tier", "x"),))
    skill = replace(tokenised(TOKENIZER, Rendered("dates.\n"), Kind.SKILL), name="dates")
    more = conversation.continued([Message("assistant", Text("ok")), Message("user", Text("and now?"))])
    added, conversation = more.added, more.conversation
    answer, question = added.split("\n<|im_start|>user")
    units = [tokenised(TOKENIZER, Rendered(text), Kind.TURN) for text in (answer + "\n", "<|im_start|>user" + question)]
    made = made.appended(units[0], erratum, units[1], erratum, skill)
    asked = "<|im_start|>user\nand now?<|im_end|>\n"
    assert open_text(made, conversation) == f"{asked}{erratum.text}{skill.text}", "what follows it is computed too"


def test_where_text_and_conversation_differ_units_are_what_is_left() -> None:
    """They differ after a turn was cut, or if the template rerenders earlier messages once another follows."""
    made, conversation = chat(("system", "status {status}."), ("user", "hi"))
    more = conversation.continued([Message("assistant", Text("ok")), Message("user", Text("and now?"))])
    added, conversation = more.added, more.conversation
    other = made.appended(tokenised(TOKENIZER, Rendered("quite another text"), Kind.TURN))
    assert open_text(other, conversation) == "quite another text"
    long = made.appended(tokenised(TOKENIZER, Rendered(f"{added} and more"), Kind.TURN))
    assert open_text(long, conversation) == f"{added} and more"
    short = made.appended(tokenised(TOKENIZER, Rendered("now?<|im_end|>\n"), Kind.TURN))
    assert open_text(short, conversation) == "now?<|im_end|>\n"
    tokenizer_ = _with_template(CHATML.replace("m['content']", "(m['content'] if loop.last else 'gone')"))
    anew = replace(conversation, template=ChatTemplate(tokenizer_))
    assert open_text(made, anew) == "<|im_start|>user\nhi<|im_end|>\n".removeprefix("<|im_start|>user\n")


def _with_template(template: str) -> Any:
    import copy

    changed = copy.copy(TOKENIZER)
    changed.chat_template = template
    return changed


def test_choices_and_words_are_checked() -> None:
    assert parse_turns("all") is Turns.ALL
    with pytest.raises(InvalidArgumentError, match="keep, open, all"):
        parse_turns("some")
    check_words(["group", "状态"])
    for words in ([""], ["..."], [3]):
        with pytest.raises(InvalidArgumentError):
            check_words(words)  # type: ignore[arg-type]


def test_joined_spans_do_not_touch() -> None:
    assert joined([Span(5, 7), Span(0, 2), Span(2, 3), Span(6, 9), Span(4, 4)]) == [Span(0, 3), Span(5, 9)]
    assert joined([Span(0, 9), Span(1, 2)]) == [Span(0, 9)]


def test_a_readers_reason_names_the_word() -> None:
    assert Reader(Span(0, 1), "x", Why.OPEN).reason == "the open question"
    assert Reader(Span(0, 1), "x", Why.MENTIONS, "a b").reason == "mentions 'a b'"


@given(
    st.lists(st.sampled_from(["status", " ", "\n", "_", "a", ".", "😀", "STATUS", "\r\n"]), max_size=14),
    st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_the_readers_are_the_tokens_of_the_lines_that_mention_it(pieces: list[str], at: int) -> None:
    """Compared with a slow search: every token after the field that has a character of such a line, and no other."""
    text = "".join([*pieces[:at], "{status}", *pieces[at:]])
    made = context(text)
    readers = readers_of(made, "status", (), Turns.KEEP, TurnSlots(len(made), len(made)))
    (place,) = made.spans("status")
    unit = made.units[0]
    (value,) = [p.characters for p in unit.places]
    expected = set()
    start = 0
    for line in re.split(r"(?<=\n)", unit.text):
        characters = range(start, start + len(line))
        mentions = any(word.lower() == "status" for word in re.findall(r"\w+", line))
        if mentions or value.start in characters:
            expected |= {i for i, (a, b) in enumerate(unit.offsets) if b > characters.start and a < characters.stop}
        start += len(line)
    assert {slot for r in readers for slot in r.span.range} == {slot for slot in expected if slot >= place.stop}


def test_words_of_words_are_declared_too() -> None:
    mentions = {"tier": ("band", "plan"), "band": ("desk",), "desk": ("band", "tier", "door"), "other": ("x",)}
    assert declared_words(mentions, "tier") == ("band", "plan", "desk", "door"), "a circle ends, the name is no word"
    assert declared_words(mentions, "band") == ("desk", "tier", "door", "plan")
    assert declared_words(mentions, "colour") == ()


@pytest.mark.parametrize("turns", list(Turns))
def test_the_lines_that_words_could_mark(turns: Turns) -> None:
    """Each of these lines, declared by its own text, is a reader at the same slots, and no other text is."""
    made = context("about status\nthe status {status} now.\nbe brief\n\n--\n  in A: deny\nlast", "cancel?\n", "ok\n")
    slots = turn_slots(made, None, "status")
    lines = dict(later_lines(made, "status", turns, slots))
    assert list(lines.values()) == [" now.\n", "be brief\n", "  in A: deny\n", "last"]
    words = [text.strip() for text in lines.values()]
    marked = {reader.span: reader.text for reader in readers_of(made, "status", words, turns, slots) if reader.word}
    assert marked.items() | {(span, text) for span, text in lines.items() if text == " now.\n"} == lines.items()
    assert list(later_lines(Context((), FIELDS), "status", turns, TurnSlots(0, 0))) == []
