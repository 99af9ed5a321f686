"""What a gateway remembers of a conversation: what was sent first, what the client said last, and the lines in between."""

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
    """In which form a line stands in the conversation."""

    SYSTEM = "system"
    """a system message"""
    USER = "user"
    """a user message"""
    INLINE = "inline"
    """the last text of the newest user message"""


@dataclass(frozen=True, slots=True)
class Note:
    """One line. It is never changed, and stays where it is."""

    after: int
    """how many turns of the client stand before it"""
    form: Form
    line: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one unit, by their places."""

    frame: str
    base: Mapping[str, str] = field(repr=False)
    """as they were sent first, and are sent again"""
    last: Mapping[str, str] = field(repr=False)
    """as the client sent them last; what differs from `base` was told in lines"""


NO_DATES = Texts("", {}, {})


@dataclass(frozen=True, slots=True)
class Head:
    """Tools and system prompt as they were sent."""

    texts: tuple[Texts, ...] = field(repr=False)
    order: tuple[str, ...] = ()
    """a digest of each tool, in the order in which they are sent"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation. A new request gives a new value; nothing in it is changed."""

    identity: str
    version: int
    """names this value of it: no other one ever has the same"""
    key: str
    """names tenant, route, model, session and all turns so far"""
    turns: int
    tools: str
    """a digest of the tools as they are sent"""
    head: tuple[Texts, ...]
    token: str = field(default="", repr=False)
    """announced in the system prompt; empty where nothing was, and no line may follow"""
    named: bool = False
    """whether the client named its session"""
    spoke: bool = False
    """whether the model has spoken in it since it was first seen: the turns before that may be examples"""
    origin: str = ""
    """the identity of the conversation that it replaced after a reset, or its own"""
    inside: Mapping[int, Texts] = field(default_factory=dict, repr=False)
    """turns that hold declared values"""
    notes: tuple[Note, ...] = ()
    notebook: str = ""
    """the notebook that it goes on with"""
    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    """the notebook's fields as they were told last, as they stand in its text"""
    order: tuple[str, ...] = ()
    """a digest of each tool, in the order in which they are sent"""
    dates: Texts = NO_DATES
    """of the chat template, by the names of its variables"""

    @property
    def plain(self) -> bool:
        """Whether its requests are sent as the client sends them."""
        return not self.token and not self.notes


def keys_of(prompt: Prompt, rules: Rules, *whose: str) -> list[str]:
    """A key for each beginning of the conversation: of one turn, of two, and so on. Declared values leave it as it is.

    Args:
        whose: what parts conversations that read alike.
    """
    chain = blake2b(repr(whose).encode(), digest_size=16)
    keys = []
    for unit in prompt.turns:
        texts = [
            rules.mask(unit, place, text).text.encode("utf-8", "surrogatepass") for place, text in unit.texts.items()
        ]
        lengths = [*zip(unit.texts, map(len, texts), strict=True)]  # they part the texts, which are not copied
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
    """A conversation whose texts are sent as they are now.

    Args:
        token: announced in its system prompt; empty where nothing is to be.
        seen: its first turns that were sent before, 0 where this is the first request that is seen of it.
        replaced: the same conversation before this request, which does not go on with what was sent.
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
    """The conversation after one more request, of which the earlier texts are sent as they were."""
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
    """The body that goes upstream; None where it is the client's own."""
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
    """Whether a request gives the chat template dates by the same names as a conversation."""
    return conversation.dates.base.keys() == prompt.dates.keys()


def moves_dates(conversation: Conversation, prompt: Prompt) -> bool:
    """Whether the chat template is given earlier dates than came."""
    return has_its_dates(conversation, prompt) and dict(conversation.dates.base) != dict(prompt.dates)


def has_its_tools(conversation: Conversation, prompt: Prompt) -> bool:
    """Whether a request has the tools of a conversation, in any order."""
    return conversation.tools == prompt.tools or are_the_same(prompt.order, conversation.order)


def moves_tools(conversation: Conversation, prompt: Prompt) -> bool:
    """Whether the same tools are sent in another order than they came."""
    return conversation.order != prompt.order and are_the_same(prompt.order, conversation.order)


def kept_bytes(conversation: Conversation, prompt: Prompt) -> int:
    """Bytes of the request, as a model reads it, from the first place that differs from what was sent to the end of that."""
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
    """Bytes before the first difference of two forms of one unit."""
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
    """Each unit that may be sent in another form, with its place, the texts it is sent with, those put behind them, and the
    messages put behind it."""
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
    """With the turns behind the first `known` ones taken in."""
    inside = dict(conversation.inside)
    spoke = conversation.spoke
    for at, unit in enumerate(prompt.turns[known:], start=known):
        spoke = spoke or unit.role == "assistant"
        if any(rules.mask(unit, place, text).values for place, text in unit.texts.items()):
            inside[at] = Texts(unit.frame, unit.texts, unit.texts)
    return replace(conversation, inside=inside, spoke=spoke)
