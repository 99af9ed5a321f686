"""Which conversation a request goes on with: compared with each that it may, nothing is planned or stored."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from programmable_kv.serve.rewriting.changes import Change, Compared, compare
from programmable_kv.serve.rewriting.conversation import Conversation, Form, Head, has_its_dates, has_its_tools
from programmable_kv.serve.rewriting.prompt import Prompt
from programmable_kv.serve.rewriting.rebase import LINES
from programmable_kv.serve.rewriting.rules import Rules, Sharing

SELDOM = "a value changed that was not seen to change repeatedly"


@dataclass(frozen=True, slots=True)
class Match:
    """A conversation that a request may go on with."""

    conversation: Conversation
    changes: tuple[Change, ...] = ()
    templates: tuple[str, ...] = field(default=(), repr=False)
    refused: str = ""
    """why it does not go on with it as it was sent"""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known beside the request."""

    rules: Rules
    keys: list[str] = field(repr=False)
    """of each beginning of the conversation"""
    named: bool = False
    """whether the client names its session"""
    learned: Collection[str] = field(default=(), repr=False)
    hoist: bool = False
    forms: Sequence[Form] = (Form.SYSTEM,)
    """in which form a line may stand at the end of this request, the best first"""
    rebase_after: int = LINES
    """lines after which a conversation is rebased"""
    whose: str = ""
    """a digest of tenant, route, model, session and salt"""
    shared: Head | None = field(default=None, repr=False)
    """the head of an earlier conversation, which a new one may begin with"""
    open: bool = True
    """whether the upstream takes lines at all, here or elsewhere in the conversation"""
    lost: Collection[Form] = ()
    """forms whose earlier lines do not reach the model"""
    seen: int = 0
    """turns of the longest beginning that was sent before"""


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
    """Dates that the client gives to the chat template now, and gave it otherwise before."""
    if has_its_dates(conversation, prompt):
        share = False if known.rules.sharing is Sharing.NONE else None
        for name, value in prompt.dates.items():
            if conversation.dates.last[name] != value:
                yield Change(name, value, True, "clock", share=share)


def choose(matches: Sequence[Match], *, alone: bool, named: bool, turns: int) -> tuple[Match | None, str]:
    """The conversation that a request goes on with; or None, and why. One that was told of lines goes before one that was not.

    Args:
        matches: in the order in which they were last used, the latest first.
        alone: whether no other conversation ever began with the same turns.
        named: whether the client names its conversation.
        turns: of the request.
    """
    fitting = [each for each in matches if not each.refused]
    if not fitting:
        refused = [each.refused for each in matches]
        return None, refused[0] if refused else ""
    certain = [each for each in fitting if _is_certain(each, alone, named, turns)]
    if not certain:
        return None, "it may be another conversation"
    least = min(len(each.changes) for each in certain)
    nearest = [each for each in certain if len(each.changes) == least]
    if least and len({each.conversation.origin for each in nearest}) > 1:
        return None, "it may go on with several conversations"
    return next((each for each in nearest if each.conversation.token), nearest[0]), ""


def _is_certain(found: Match, alone: bool, named: bool, turns: int) -> bool:
    """Whether no other conversation's values would be told by mistake."""
    old = found.conversation
    grew = old.spoke and turns > old.turns  # the same turns again may be another conversation that begins like it
    return (named and old.named) or (alone and grew) or all(change.harmless for change in found.changes)
