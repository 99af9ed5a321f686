"""What a gateway stores of a conversation: the texts first sent, those the client last sent, and the lines between."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Any

from programmable_kv.explain.difference import common_length
from programmable_kv.serve.rewriting.prompt import Prompt, Unit, rewritten, with_texts
from programmable_kv.serve.rewriting.rules import Rules
from programmable_kv.serve.rewriting.tools import are_the_same, bytes_moved
from programmable_kv.serve.rewriting.wording import announcement


class Form(StrEnum):
    """The form in which a line stands in the conversation."""

    SYSTEM = "system"
    """A system message."""
    USER = "user"
    """A user message."""
    INLINE = "inline"
    """The last text of the newest user message."""


@dataclass(frozen=True, slots=True)
class Note:
    """One line. It is never changed or moved."""

    after: int
    """How many of the client's turns stand before the line."""
    form: Form
    line: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one unit, by their places."""

    frame: str
    base: Mapping[str, str] = field(repr=False)
    """The texts as they were first sent, and are sent again."""
    last: Mapping[str, str] = field(repr=False)
    """The texts as the client last sent them. Lines stated what differs from `base`."""


NO_DATES = Texts("", {}, {})


@dataclass(frozen=True, slots=True)
class Head:
    """Tools and system prompt as they were sent."""

    texts: tuple[Texts, ...] = field(repr=False)
    order: tuple[str, ...] = ()
    """A digest of each tool, in the order in which they are sent."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation. Each new request makes a new value; a value is never changed."""

    identity: str
    version: int
    """Identifies this value: no other value of the same conversation has the same version."""
    key: str
    """A digest of all turns so far and of what separates conversations: tenant, route, model, session and others."""
    turns: int
    tools: str
    """A digest of the tools as they are sent."""
    head: tuple[Texts, ...]
    token: str = field(default="", repr=False)
    """The token that the system prompt announced. Empty if it announced none; then no line may follow."""
    named: bool = False
    """Whether the client named its session."""
    spoke: bool = False
    """Whether the model has answered since the conversation was first seen. Earlier assistant turns may be examples."""
    origin: str = ""
    """The identity of the conversation that it replaced after a reset, or its own."""
    inside: Mapping[int, Texts] = field(default_factory=dict, repr=False)
    """The texts of turns that contain declared values, by the turn's index."""
    notes: tuple[Note, ...] = ()
    notebook: str = ""
    """The notebook that the conversation continues."""
    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The notebook's field values as last stated, as they are written in its text."""
    order: tuple[str, ...] = ()
    """A digest of each tool, in the order in which they are sent."""
    dates: Texts = NO_DATES
    """Dates of the chat template, by the names of its variables."""

    @property
    def plain(self) -> bool:
        """Whether nothing is added to its requests: no announcement and no lines."""
        return not self.token and not self.notes


def keys_of(prompt: Prompt, rules: Rules, *whose: str) -> list[str]:
    """A key for each beginning of the conversation: of one turn, of two, and so on. Declared values do not matter.

    Args:
        whose: what separates conversations with the same text, such as the tenant.
    """
    chain = blake2b(repr(whose).encode(), digest_size=16)
    keys = []
    for unit in prompt.turns:
        texts = [
            rules.mask(unit, place, text).text.encode("utf-8", "surrogatepass") for place, text in unit.texts.items()
        ]
        lengths = [*zip(unit.texts, map(len, texts), strict=True)]  # they separate the texts without a copy
        chain.update(repr((unit.role, unit.frame, lengths)).encode("utf-8", "surrogatepass"))
        for text in texts:
            chain.update(text)
        keys.append(chain.hexdigest())
    return keys


def begun(
    prompt: Prompt,
    rules: Rules,
    keys: list[str],
    *,
    token: str,
    named: bool,
    seen: int = 0,
    replaced: Conversation | None = None,
) -> Conversation:
    """Begin a conversation, whose texts are sent as they are in this request.

    Args:
        token: the token to announce in its system prompt; empty: announce nothing.
        seen: how many of its first turns were sent before; 0 if this is its first request that is seen.
        replaced: the same conversation before this request, which does not continue what was sent.
    """
    head = tuple(Texts(unit.frame, unit.texts, unit.texts) for unit in prompt.head)
    identity = secrets.token_hex(8)
    origin = identity if replaced is None else replaced.origin
    found = Conversation(
        identity, 1, keys[-1], len(keys), prompt.tools, head, token, named, origin=origin, order=prompt.order,
        dates=Texts("", prompt.dates, prompt.dates),
    )  # fmt: skip
    spoke = seen > 0 and any(unit.role == "assistant" for unit in prompt.turns[seen:])
    return replace(_with_turns(found, prompt, rules), spoke=spoke)


def continued(conversation: Conversation, prompt: Prompt, rules: Rules, keys: list[str]) -> Conversation:
    """The conversation after one more request. Earlier texts are sent again unchanged."""
    head = tuple(replace(kept, last=unit.texts) for kept, unit in zip(conversation.head, prompt.head, strict=True))
    turns = prompt.turns
    inside = {at: replace(kept, last=turns[at].texts) for at, kept in conversation.inside.items()}
    dates = replace(conversation.dates, last=prompt.dates)
    if not has_its_dates(conversation, prompt):
        dates = Texts("", prompt.dates, prompt.dates)
    found = replace(
        conversation, version=secrets.randbits(62), key=keys[-1], turns=len(keys), head=head, inside=inside, dates=dates
    )
    return _with_turns(found, prompt, rules, conversation.turns)


def sent(conversation: Conversation, prompt: Prompt) -> bytes | None:
    """The body to send upstream; None if it is the client's own."""
    changes: dict[int, tuple[Any, tuple[Any, ...]]] = {}
    for place, unit, kept, more, behind in _sent_units(conversation, prompt):
        other = {at: text for at, text in kept.items() if unit.texts.get(at) != text}
        value = with_texts(prompt.value(unit), other, more, route=prompt.route) if other or more else None
        if value is not None or behind:
            changes[place] = (value, behind)
    order = conversation.order if moves_tools(conversation, prompt) else ()
    dates = conversation.dates.base if moves_dates(conversation, prompt) else None
    return rewritten(prompt, changes, order, dates) if changes or order or dates else None


def has_its_dates(conversation: Conversation, prompt: Prompt) -> bool:
    """Whether a request gives the chat template the same date variables as the conversation."""
    return conversation.dates.base.keys() == prompt.dates.keys()


def moves_dates(conversation: Conversation, prompt: Prompt) -> bool:
    """Whether the chat template is given the conversation's dates instead of the request's."""
    return has_its_dates(conversation, prompt) and dict(conversation.dates.base) != dict(prompt.dates)


def has_its_tools(conversation: Conversation, prompt: Prompt) -> bool:
    """Whether a request has the tools of a conversation, in any order."""
    return conversation.tools == prompt.tools or are_the_same(prompt.order, conversation.order)


def moves_tools(conversation: Conversation, prompt: Prompt) -> bool:
    """Whether the request's tools are sent in the conversation's order instead of their own."""
    return conversation.order != prompt.order and are_the_same(prompt.order, conversation.order)


def kept_bytes(conversation: Conversation, prompt: Prompt) -> int:
    """Bytes of the request from its first difference from what was sent before, up to the end of that.

    They are counted in the order in which a model reads the request."""
    head = len(prompt.head)
    sent_before = head + conversation.turns
    if moves_tools(conversation, prompt):
        moved = bytes_moved(prompt.body, prompt.order, conversation.order)
        return moved + prompt.size(*prompt.units[:sent_before])
    if moves_dates(conversation, prompt):  # templates write them near the top
        return prompt.size(*prompt.units[:sent_before])
    firsts = {head + note.after: 0 for note in conversation.notes}
    for place, unit, kept, _, _ in _sent_units(conversation, prompt):
        if any(unit.texts[at] != text for at, text in kept.items()):
            firsts[place] = _equal_bytes(unit.texts, kept)
    if not firsts:
        return 0
    first = min(firsts)
    return max(0, prompt.size(*prompt.units[first:sent_before]) - firsts[first])


def _equal_bytes(texts: Mapping[str, str], others: Mapping[str, str]) -> int:
    """Bytes before the first difference between two versions of one unit."""
    found = 0
    for at, text in texts.items():
        same = common_length(text, others[at])
        found += len(text[:same].encode("utf-8", "surrogatepass"))
        if same < len(text) or text != others[at]:
            break
    return found


def _sent_units(
    conversation: Conversation, prompt: Prompt
) -> Iterable[tuple[int, Unit, Mapping[str, str], tuple[str, ...], tuple[Any, ...]]]:
    """Each unit that may be sent changed: its place, the unit, the texts it is sent with, the texts appended to it, and
    the messages inserted behind it."""
    head = prompt.head
    role = head[-1].role if head else "system"
    for place, unit in enumerate(head):
        more = (announcement(conversation.token),) if conversation.token and place == len(head) - 1 else ()
        yield place, unit, conversation.head[place].base, more, ()
    notes: dict[int, list[Note]] = {}
    for note in conversation.notes:
        notes.setdefault(note.after - 1, []).append(note)
    for turn in sorted({*conversation.inside, *notes}):
        kept = conversation.inside.get(turn)
        inline = tuple(note.line for note in notes.get(turn, ()) if note.form is Form.INLINE)
        behind = tuple(
            {"role": role if note.form is Form.SYSTEM else "user", "content": note.line}
            for note in notes.get(turn, ())
            if note.form is not Form.INLINE
        )
        place = len(head) + turn
        yield place, prompt.units[place], kept.base if kept is not None else {}, inline, behind


def _with_turns(conversation: Conversation, prompt: Prompt, rules: Rules, known: int = 0) -> Conversation:
    """The conversation with the turns after the first `known` ones added."""
    inside = dict(conversation.inside)
    spoke = conversation.spoke
    for at, unit in enumerate(prompt.turns[known:], start=known):
        spoke = spoke or unit.role == "assistant"
        if any(rules.mask(unit, place, text).values for place, text in unit.texts.items()):
            inside[at] = Texts(unit.frame, unit.texts, unit.texts)
    return replace(conversation, inside=inside, spoke=spoke)
