"""Plans what to do with a request. A plan is a value that can be inspected; making one sends and stores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from programmable_kv.serve.rewriting.changes import Change, may_hold
from programmable_kv.serve.rewriting.conversation import (
    Conversation,
    Form,
    Note,
    begun,
    continued,
    has_its_dates,
    kept_bytes,
    moves_tools,
    sent,
)
from programmable_kv.serve.rewriting.matching import Known, Match, match
from programmable_kv.serve.rewriting.naming import are_clear, declared_values
from programmable_kv.serve.rewriting.prompt import Prompt, holds_thinking, open_calls
from programmable_kv.serve.rewriting.rebase import Warming, warming
from programmable_kv.serve.rewriting.rules import Sharing
from programmable_kv.serve.rewriting.tools import may_act
from programmable_kv.serve.rewriting.wording import line_of, new_token, placeholder

_LEAST_BUDGET = 8192
"""Bytes of lines that every conversation may have."""
_BUDGET = 0.25
"""Fraction of the body that the lines may take up, if that is more than `_LEAST_BUDGET`."""
_SHARED_BUDGET = 0.125
"""Fraction of the saved bytes that the line behind a shared head may have. If it is longer, a new head is sent."""


_UNCLEAR = "several places share a name but have different values"
_REORDERED = "the tools are sent in their earlier order"


class Action(StrEnum):
    """What was done with a request."""

    FORWARDED = "forwarded"
    """Nothing: every byte is sent unchanged."""
    ANNOUNCED = "announced"
    """A conversation begins, and its system prompt says that lines may follow."""
    HOISTED = "hoisted"
    """A conversation begins, and its values stand at the end instead of in the system prompt."""
    SHARED = "shared"
    """A conversation begins with the system prompt of an earlier one, and a line with its own values."""
    REPLAYED = "replayed"
    """The earlier bytes and lines are sent again; there is nothing new to state."""
    ERRATUM = "erratum"
    """The earlier bytes and lines are sent again, with a new line."""
    RESET = "reset"
    """Something else changed: the conversation starts over from the client's own text."""
    REBASE = "rebase"
    """The lines became many: the conversation goes on with the new values in their places."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send, and what to store about it."""

    action: Action
    why: str = ""
    body: bytes | None = field(default=None, repr=False)
    """The body to send; None: the client's own bytes."""
    before: Conversation | None = field(default=None, repr=False)
    after: Conversation | None = field(default=None, repr=False)
    note: Note | None = field(default=None, repr=False)
    """The new line."""
    saved_bytes: int = 0
    """Upper bound on the bytes that a prefix cache would have missed and now finds."""
    added_bytes: int = 0
    """Bytes of the lines."""
    head_bytes: int = 0
    """Bytes of the tools and the system prompt."""
    turns_bytes: int = 0
    """Bytes of the turns that were sent before."""
    replaced: Conversation | None = field(default=None, repr=False)
    """The conversation that ends here and continues as `after`."""
    warming: Warming | None = field(default=None, repr=False)
    """The prefix to compute in the background, which the conversation continues later."""
    notebook_version: int = 0
    """Of a request to a notebook: the version whose values are stated. The plan is stored only if it is the latest."""


def plan(prompt: Prompt, found: Match | None, known: Known, why: str, replaced: Conversation | None = None) -> Plan:
    """Plan a request.

    Args:
        found: the conversation that the request continues; None if there is none.
        why: why there is none, although one was looked for.
        replaced: if there is none: the conversation that this one was until now, if that is certain.
    """
    if found is None:
        shared = _shared(prompt, known) if not why and replaced is None else None
        return shared or _afresh(prompt, known, Action.RESET if why else Action.FORWARDED, why, replaced)
    old = found.conversation
    if old.token and old.token in prompt.body.text:
        return _afresh(prompt, known, Action.RESET, "the client's text contains the conversation's token", old)
    new = continued(old, prompt, known.rules, known.keys)
    told = [change for change in found.changes if change.tell]
    moved = moves_tools(old, prompt)
    if any(note.form in known.lost for note in old.notes):
        return _afresh(prompt, known, Action.RESET, "an earlier line does not reach the model", old)
    if old.plain and not (moved and not found.changes):
        if not found.changes:
            return Plan(Action.FORWARDED, "", None, old, new)
        return _afresh(prompt, known, Action.RESET, "the conversation did not announce lines", old)
    if not told:
        replayed = replace(_planned(Action.REPLAYED, prompt, old, new, None), why=_REORDERED if moved else "")
        return _with_warming(replayed, prompt, known, old)
    if not are_clear(told, prompt, known.rules):
        return _afresh(prompt, known, Action.RESET, _UNCLEAR, old)
    if not _has_place(prompt):
        return _afresh(prompt, known, Action.RESET, "no line can be appended to this request", old)
    form = _form(prompt, known, told, old.notes)
    if form is None:
        return _afresh(prompt, known, Action.RESET, "the upstream accepts no line", old)
    note = Note(len(known.keys), form, line_of(old.token, told))
    made = _planned(Action.ERRATUM, prompt, old, replace(new, notes=(*new.notes, note)), note)
    if 2 * len(note.line) > made.head_bytes + made.turns_bytes:
        return _afresh(prompt, known, Action.RESET, "the line would be longer than what it saves", old)
    if made.added_bytes > max(_LEAST_BUDGET, _BUDGET * len(prompt.body.text)) and not holds_thinking(prompt):
        return _afresh(prompt, known, Action.REBASE, "there are too many lines", old)
    return _with_warming(made, prompt, known, old)


def switched(made: Plan, replaced: Conversation) -> Plan:
    """The plan of a request that continues a prefix warmed in the background, which replaces a conversation."""
    return replace(made, action=Action.REBASE, why="warmed in the background", replaced=replaced)


def compacted(prompt: Prompt, latest: Conversation, known: Known) -> Plan | None:
    """Plan a request whose turns are new in a session whose system prompt was sent before.

    The client replaced its turns by a summary, or began again. The system prompt is sent again unchanged, and one line
    states what is new in it; in the background the new values are put in their places. None if that is impossible.

    The line states the request's own values, so another conversation in the same session does not matter.

    Args:
        latest: the session's latest conversation.
    """
    if not latest.token or latest.token in prompt.body.text:
        return None
    sent_before = tuple(replace(kept, last=kept.base) for kept in latest.head)
    dates = replace(latest.dates, last=latest.dates.base)
    old = replace(latest, head=sent_before, dates=dates, inside={}, notes=(), turns=0)
    found = match(old, prompt, known)
    planned = _behind_head(Action.REBASE, prompt, known, found) if not found.refused else None
    if planned is None:
        return None
    planned = replace(planned, why="the turns are new in this session")
    return _with_warming(planned, prompt, replace(known, rebase_after=1), latest)


def _shared(prompt: Prompt, known: Known) -> Plan | None:
    """Plan a conversation that begins with the head of an earlier one. One line states its own values if they differ.
    The conversation has its own token, announced behind the head. None if that is impossible, or does not pay.
    """
    if known.shared is None or holds_thinking(prompt):  # reasoning is bound to the head that it was generated after
        return None
    made = begun(prompt, known.rules, known.keys, token=new_token(), named=known.named)
    old = replace(made, head=known.shared.texts, order=known.shared.order, inside={}, turns=0)
    learned = known.learned if known.rules.sharing is Sharing.LEARNED else ()
    found = match(old, prompt, replace(known, learned=learned))
    differs = found.changes or moves_tools(old, prompt)
    if found.refused or not differs or not all(change.shareable for change in found.changes):
        return None
    planned = _behind_head(Action.SHARED, prompt, known, found)
    if planned is None or planned.added_bytes > _SHARED_BUDGET * planned.saved_bytes:
        return None
    return planned


def _behind_head(action: Action, prompt: Prompt, known: Known, found: Match) -> Plan | None:
    """Plan new turns behind a head that was sent before, and one line that states what is new in it. None if the line
    has no place.

    Args:
        found: the comparison with a conversation that has this head and no turns.
    """
    old = found.conversation
    told = [change for change in found.changes if change.tell]
    form = _form(prompt, known, told)
    if told and (form is None or not _has_place(prompt) or not are_clear(told, prompt, known.rules)):
        return None
    made = begun(prompt, known.rules, known.keys, token=old.token, named=known.named)
    made = replace(made, tools=old.tools, order=old.order)
    if has_its_dates(old, prompt):
        made = replace(made, dates=replace(made.dates, base=old.dates.base))
    head = tuple(replace(new, base=kept.base) for new, kept in zip(made.head, old.head, strict=True))
    note = Note(made.turns, form, line_of(old.token, told)) if told and form is not None else None
    made = replace(made, head=head, notes=(note,) if note is not None else ())
    return replace(_planned(action, prompt, old, made, note), before=None)


def _with_warming(made: Plan, prompt: Prompt, known: Known, old: Conversation) -> Plan:
    """The plan, and if the lines became many, a prefix to compute without them. A conversation whose reasoning is bound
    to the text before it keeps its lines. So does one with tools that the server runs, because they could act twice."""
    lines = len(made.after.notes) if made.after is not None else 0
    budget = max(_LEAST_BUDGET, _BUDGET * len(prompt.body.text)) / 2
    if not lines or (lines < known.rebase_after and made.added_bytes <= budget):
        return made
    if holds_thinking(prompt) or may_act(prompt.body):
        return made
    anew = _afresh(prompt, known, Action.REBASE, "", old)
    assert anew.after is not None, "a conversation begins"
    data = prompt.body.text.encode() if anew.body is None else anew.body
    return replace(made, warming=warming(prompt.route, anew.after, data))


def _afresh(prompt: Prompt, known: Known, action: Action, why: str, replaced: Conversation | None) -> Plan:
    """Plan a request from the client's own text. If something in it may change, its system prompt announces lines."""
    token = new_token() if _may_change(prompt, known) else ""
    made = begun(prompt, known.rules, known.keys, token=token, named=known.named, seen=known.seen, replaced=replaced)
    note = None
    begins = action is Action.FORWARDED
    if token and known.hoist and _has_place(prompt):
        hoisted = _hoisted(made, prompt, known)
        if hoisted is not None:
            made, note = hoisted, hoisted.notes[0]
            action = Action.HOISTED if begins else action
    if token and begins and note is None:
        action = Action.ANNOUNCED
    body = sent(made, prompt) if token else None
    return Plan(action, why, body, None, made, note, added_bytes=_added(made), replaced=replaced)


def _may_change(prompt: Prompt, known: Known) -> bool:
    """Whether the prompt has a declared or learned piece or a template's date, and a place to announce lines."""
    head = prompt.head
    if not head or not known.open:
        return False
    value = prompt.value(head[-1])
    content = value.get("content") if head[-1].index is not None else value
    if not isinstance(content, str | list):
        return False
    if prompt.dates:
        return True
    for unit in prompt.units:
        for place, text in unit.texts.items():
            if known.rules.mask(unit, place, text).values:
                return True
            if unit.head and known.learned and may_hold(text, known.learned):
                return True
    return False


def _hoisted(made: Conversation, prompt: Prompt, known: Known) -> Conversation | None:
    """The conversation with its declared values at the end instead of in the system prompt; None if no value can move.
    A name with several values stays in place: at the end nobody could tell which is which."""
    several = {name for name, values in declared_values(prompt, known.rules).items() if len(values) > 1}
    head = []
    told: list[Change] = []
    for kept, unit in zip(made.head, prompt.head, strict=True):
        base = dict(kept.base)
        for place, text in unit.texts.items():
            masked = known.rules.mask(unit, place, text)
            moved = [each for each in masked.values if each.rule.tell and each.rule.name not in several]
            for value in reversed(moved):
                base[place] = base[place][: value.start] + placeholder(value.rule.name) + base[place][value.stop :]
            told += [Change(each.rule.name, each.value, True, "value") for each in moved]
        head.append(replace(kept, base=base))
    form = _form(prompt, known, told)
    if not told or form is None:
        return None
    note = Note(made.turns, form, line_of(made.token, told))
    return replace(made, head=tuple(head), notes=(note,))


def _planned(action: Action, prompt: Prompt, old: Conversation, new: Conversation, note: Note | None) -> Plan:
    tools = prompt.body.spots.get("tools")
    return Plan(
        action,
        body=sent(new, prompt),
        before=old,
        after=new,
        note=note,
        saved_bytes=kept_bytes(old, prompt),
        added_bytes=_added(new),
        head_bytes=prompt.size(*prompt.head) + (tools.stop - tools.start if tools is not None else 0),
        turns_bytes=prompt.size(*prompt.turns[: old.turns]),
    )


def _added(conversation: Conversation) -> int:
    return sum(len(note.line.encode("utf-8", "surrogatepass")) for note in conversation.notes)


def _has_place(prompt: Prompt) -> bool:
    """Whether a line may stand at the end: not between a tool call and its result, not in the model's own words, and
    not in a message that the model is asked to continue."""
    if prompt.body.data.get("continue_final_message"):
        return False
    return prompt.units[-1].role in ("user", "tool") and not open_calls(prompt)


def _form(prompt: Prompt, known: Known, told: Sequence[Change], notes: Sequence[Note] = ()) -> Form | None:
    """The best form that the upstream takes, or None. What a user wrote is never stated in a system message."""
    newest = prompt.units[-1]
    behind = any(note.after == len(known.keys) and note.form is not Form.INLINE for note in notes)
    user = newest.role == "user" and isinstance(prompt.value(newest).get("content"), str | list)
    for form in known.forms:
        if form is Form.SYSTEM and not all(change.trusted for change in told):
            continue
        if form is Form.INLINE and (behind or not user):
            continue
        return form
    return None
