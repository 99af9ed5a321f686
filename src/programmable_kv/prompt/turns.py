"""Where the turns of a cached conversation begin, and which of them are still unanswered. No tensors here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from programmable_kv.cache.span import Span
from programmable_kv.errors import TemplateError
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.parts import Message, unmarked
from programmable_kv.prompt.prompt import SKILL_MARK
from programmable_kv.prompt.template import HEAD_ROLES
from programmable_kv.prompt.units import Kind

_ANSWERING = frozenset({"assistant", "model"})


@dataclass(frozen=True, slots=True)
class TurnSlots:
    """Slots at which turns begin; the context's end where there are none."""

    first: int
    """of the first turn"""
    open: int
    """of the first turn since the last answer"""


def turn_characters(conversation: Conversation, text: str, line: int) -> tuple[int, int]:
    """The characters of a rendered prompt at which its turns begin, and those since the last answer; its end if there are none.

    The messages that instruct are no turns, and neither are those up to the last one before any answer that holds a field. Of
    a prompt that is such a message to its end, the last line is the open question if a user said it; `line` is where it begins.
    """
    messages = conversation.messages
    unanswered = next((i for i, message in enumerate(messages) if message.role in _ANSWERING), len(messages))
    first, after = _turn_messages(messages, [bool(m.content.placeholders) for m in messages[:unanswered]])
    if first == len(messages):
        ends = line if _asks(messages) else len(text)
        return ends, ends
    opens = _character_of(conversation, text, after)
    begins = _character_of(conversation, text, first)
    opens = len(text) if opens is None else opens
    return (opens if begins is None else begins), opens


def _turn_messages(messages: Sequence[Message], holds: Sequence[bool]) -> tuple[int, int]:
    """The first message that is a turn, and the first since the last answer.

    Those that instruct are none, and neither are those up to the last one that holds a field (`holds`, of the first messages).
    """
    instructions = next((i for i, message in enumerate(messages) if message.role not in HEAD_ROLES), len(messages))
    first = max([instructions, *(i + 1 for i, held in enumerate(holds) if held)])
    return first, max([first, *(i + 1 for i, message in enumerate(messages) if message.role in _ANSWERING)])


def _asks(messages: Sequence[Message]) -> bool:
    """Whether a user, or a tool, said the last message."""
    return bool(messages) and messages[-1].role not in {*HEAD_ROLES, *_ANSWERING}


def _character_of(conversation: Conversation, text: str, index: int) -> int | None:
    """The character at which a message begins; None if the template renders it apart."""
    if index >= len(conversation.messages):
        return len(text)
    if index == 0:
        return 0
    try:
        before = replace(conversation, messages=conversation.messages[:index], text=None)
        added = unmarked(before.continued(conversation.messages[index:]).added)
    except TemplateError:
        return None
    return len(text) - len(added) if text.endswith(added) else None


def last_line(text: str) -> int:
    """The character at which the last line begins that says something."""
    return text.rstrip().rfind("\n") + 1


def turn_slots(context: Context, conversation: Conversation | None, name: str) -> TurnSlots:
    """Where the turns begin that follow a field.

    In a chat, turns are the messages after those that instruct and after the one that holds the field. Where the last message
    holds the field itself, and in raw text without turns, the context's last line stands for the open question.
    """
    if conversation is None:
        return _by_units(context)
    messages = conversation.messages
    first, after = _turn_messages(messages, [name in message.content.placeholders for message in messages])
    if first == len(messages):
        line = _last_line(context) if _asks(messages) else len(context)
        return TurnSlots(line, line)
    written = {name: value.written for name, value in context.fields.items()}
    rendered = replace(conversation, values={**conversation.values, **written}, text=None)
    begin, asked = (_slot_of(context, rendered, index) for index in (first, after))
    # A part that was cut or moved, or a template that renders earlier messages anew: units are what is left to go by.
    units = _by_units(context)
    asked = units.open if asked is None else asked
    return TurnSlots(min(units.first if begin is None else begin, asked), asked)


def _slot_of(context: Context, conversation: Conversation, index: int) -> int | None:
    """The slot at which a message begins; None if the context does not end as the conversation does from there on."""
    if index >= len(conversation.messages):
        return len(context)
    if index == 0:
        return 0
    try:
        before = replace(conversation, messages=conversation.messages[:index])
        left = before.continued(conversation.messages[index:]).added
    except TemplateError:
        return None
    for start, unit in zip(reversed(context.starts[:-1]), reversed(context.units), strict=True):
        if unit.kind is Kind.ERRATUM:  # no message of the conversation
            continue
        if unit.kind is Kind.SKILL and unit.piece > 1:  # the mark stands for all of its pieces
            continue
        if unit.kind is Kind.SKILL:  # without a mark it was spliced in later, and is no part of a message
            left = left.removesuffix(SKILL_MARK)
        elif len(unit.text) < len(left):
            if not left.endswith(unit.text):
                return None
            left = left[: len(left) - len(unit.text)]
        elif unit.text.endswith(left):
            length = len(unit.text)
            return start + unit.covering(Span(length - len(left), length)).start
        else:
            return None
    return None


def _by_units(context: Context) -> TurnSlots:
    """By the turns that were added after prefill; the last line of the text if there is none."""
    turns = [start for start, unit in zip(context.starts, context.units, strict=False) if unit.kind is Kind.TURN]
    line = turns[-1] if turns else _last_line(context)
    return TurnSlots(turns[0] if turns else line, line)


def _last_line(context: Context) -> int:
    """The first slot of the last line that says something, errata aside; the context's end if none does."""
    for start, unit in zip(reversed(context.starts[:-1]), reversed(context.units), strict=True):
        if unit.kind is not Kind.ERRATUM and (stripped := unit.text.rstrip()):
            return start + unit.covering(Span(stripped.rfind("\n") + 1, len(unit.text))).start
    return len(context)
