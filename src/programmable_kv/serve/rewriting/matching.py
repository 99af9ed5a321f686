"""Finds the conversation that a request continues, by comparing it with each candidate. Plans and stores nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from programmable_kv.serve.rewriting.changes import Change, Compared, compare
from programmable_kv.serve.rewriting.conversation import Conversation, Form, Head, has_its_dates, has_its_tools
from programmable_kv.serve.rewriting.prompt import Prompt
from programmable_kv.serve.rewriting.rebase import LINES
from programmable_kv.serve.rewriting.rules import Rules, Sharing

SELDOM = "a value changed that is not known to change repeatedly"


@dataclass(frozen=True, slots=True)
class Match:
    """A conversation that a request may continue."""

    conversation: Conversation
    changes: tuple[Change, ...] = ()
    templates: tuple[str, ...] = field(default=(), repr=False)
    refused: str = ""
    """Why the request does not continue it as it was sent; empty if it does."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known apart from the request itself."""

    rules: Rules
    keys: list[str] = field(repr=False)
    """The key of each beginning of the conversation."""
    named: bool = False
    """Whether the client names its session."""
    learned: Collection[str] = field(default=(), repr=False)
    hoist: bool = False
    forms: Sequence[Form] = (Form.SYSTEM,)
    """The forms that a line at the end of this request may have, the best first."""
    rebase_after: int = LINES
    """Number of lines after which a conversation is rebased."""
    whose: str = ""
    """A digest of tenant, route, model, session and salt."""
    shared: Head | None = field(default=None, repr=False)
    """The head of an earlier conversation, which a new one may begin with."""
    open: bool = True
    """Whether the upstream takes lines at all, here or later in the conversation."""
    lost: Collection[Form] = ()
    """Forms whose earlier lines do not reach the model."""
    seen: int = 0
    """Number of turns in the longest beginning that was sent before."""


def match(conversation: Conversation, prompt: Prompt, known: Known) -> Match:
    """Compare a request with a conversation whose turns it begins with."""
    if not has_its_tools(conversation, prompt):
        return Match(conversation, refused="the tools changed")
    if [kept.frame for kept in conversation.head] != [unit.frame for unit in prompt.head]:
        return Match(conversation, refused="the system prompt changed")
    pairs = [(kept, unit) for kept, unit in zip(conversation.head, prompt.head, strict=True)]
    pairs += [(kept, prompt.turns[at]) for at, kept in conversation.inside.items()]
    found: list[Compared] = []
    for kept, unit in pairs:
        for place, text in unit.texts.items():
            found.append(compare(unit, place, kept.last[place], text, known.rules, known.learned))
    changes = (*_dates(conversation, prompt, known), *(change for each in found for change in each.changes))
    templates = tuple(dict.fromkeys(template for each in found for template in each.templates))
    unexplained = [each for each in found if not each.explained]
    if not unexplained:
        return Match(conversation, changes, templates)
    if all(each.templates for each in unexplained):
        return Match(conversation, changes, templates, SELDOM)
    return Match(conversation, changes, (), "other text changed")


def _dates(conversation: Conversation, prompt: Prompt, known: Known) -> Iterator[Change]:
    """The changes of the dates that the client gives to the chat template."""
    if has_its_dates(conversation, prompt):
        share = False if known.rules.sharing is Sharing.NONE else None
        for name, value in prompt.dates.items():
            if conversation.dates.last[name] != value:
                yield Change(name, value, True, "clock", share=share)


def choose(matches: Sequence[Match], *, alone: bool, named: bool, turns: int) -> tuple[Match | None, str]:
    """The conversation that a request continues; or None, and why. Conversations that announced lines are preferred.

    Args:
        matches: the candidates, the one that was last used first.
        alone: whether no other conversation ever began with the same turns.
        named: whether the client names its conversation.
        turns: number of turns of the request.
    """
    fitting = [each for each in matches if not each.refused]
    if not fitting:
        refused = [each.refused for each in matches]
        return None, refused[0] if refused else ""
    certain = [each for each in fitting if _is_certain(each, alone, named, turns)]
    if not certain:
        return None, "it may belong to another conversation"
    least = min(len(each.changes) for each in certain)
    nearest = [each for each in certain if len(each.changes) == least]
    if least and len({each.conversation.origin for each in nearest}) > 1:
        return None, "it may continue several conversations"
    return next((each for each in nearest if each.conversation.token), nearest[0]), ""


def _is_certain(found: Match, alone: bool, named: bool, turns: int) -> bool:
    """Whether it is certain that no other conversation's values are stated by mistake."""
    old = found.conversation
    grew = old.spoke and turns > old.turns  # the same turns again may be another conversation that begins like it
    return (named and old.named) or (alone and grew) or all(change.harmless for change in found.changes)
