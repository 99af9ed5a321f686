"""Finds where the turns of a cached conversation begin, and which of them are still unanswered. No tensors here."""

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
    """Slots at which turns begin; the context's end if there are none."""

    first: int
    """The first slot of the first turn."""
    open: int
    """The first slot of the first turn after the last answer."""


def turn_characters(conversation: Conversation, text: str, line: int) -> tuple[int, int]:
    """The characters of a rendered prompt at which its turns, and its turns after the last answer, begin; else its end.

    System and developer messages are not turns. Before the first answer, neither is a message that holds a field, nor
    any message before it. If such messages make up the whole prompt and a user or a tool wrote the last one, its last
    line counts as the open question.

    Args:
        line: the character at which the prompt's last line begins.
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
    """The index of the first message that is a turn, and of the first turn after the last answer.

    Leading system and developer messages are not turns, nor are the messages up to the last one that holds a field.

    Args:
        holds: whether each of the first messages holds a field.
    """
    instructions = next((i for i, message in enumerate(messages) if message.role not in HEAD_ROLES), len(messages))
    first = max([instructions, *(i + 1 for i, held in enumerate(holds) if held)])
    return first, max([first, *(i + 1 for i, message in enumerate(messages) if message.role in _ANSWERING)])


def _asks(messages: Sequence[Message]) -> bool:
    """Whether the last message is a user's or a tool's."""
    return bool(messages) and messages[-1].role not in {*HEAD_ROLES, *_ANSWERING}


def _character_of(conversation: Conversation, text: str, index: int) -> int | None:
    """The character at which a message begins; None if the template does not render it at the end of the text."""
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
    """The character at which the last line that is not blank begins."""
    return text.rstrip().rfind("\n") + 1


def turn_slots(context: Context, conversation: Conversation | None, name: str) -> TurnSlots:
    """The slots at which the turns that follow a field begin.

    In a chat, the turns are the messages after the leading system and developer messages and after the last message
    that holds the field. If that is the last message and a user or a tool wrote it, or if the context is raw text
    without turns, the context's last line counts as the open question.
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
    # After a cut or a move, or with a template that renders earlier messages differently, only the units tell.
    units = _by_units(context)
    asked = units.open if asked is None else asked
    return TurnSlots(min(units.first if begin is None else begin, asked), asked)


def _slot_of(context: Context, conversation: Conversation, index: int) -> int | None:
    """The slot at which a message begins; None if the context does not end with the conversation from there on."""
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
        if unit.kind is Kind.ERRATUM:  # not a message of the conversation
            continue
        if unit.kind is Kind.SKILL and unit.piece > 1:  # one mark stands for all pieces of the skill
            continue
        if unit.kind is Kind.SKILL:  # a skill without a mark was spliced in later and belongs to no message
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
    """The turns that were added after prefill; if there are none, the last line of the text."""
    turns = [start for start, unit in zip(context.starts, context.units, strict=False) if unit.kind is Kind.TURN]
    line = turns[-1] if turns else _last_line(context)
    return TurnSlots(turns[0] if turns else line, line)


def _last_line(context: Context) -> int:
    """The first slot of the last line that is not blank and not an erratum; the context's end if there is none."""
    for start, unit in zip(reversed(context.starts[:-1]), reversed(context.units), strict=True):
        if unit.kind is not Kind.ERRATUM and (stripped := unit.text.rstrip()):
            return start + unit.covering(Span(stripped.rfind("\n") + 1, len(unit.text))).start
    return len(context)
