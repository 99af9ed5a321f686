"""The ledger after a plan's steps, as pure functions. Planning simulates a plan with them; `apply` uses them too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import overload

from programmable_kv.cache.span import Span
from programmable_kv.design.build import AnyLedger, Build
from programmable_kv.edits.plan import Compute, Exchange, Insert, Recompile, Select, Shift, Step, Truncate
from programmable_kv.ledger.ledger import Ledger, Stretch
from programmable_kv.ledger.run import Origin, Run
from programmable_kv.ledger.version import TOKEN_BYTES, Content, Version
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.units import Unit
from programmable_kv.skills.skill import Skill
from programmable_kv.states import TokenState


@overload
def on_ledger(step: Step, ledger: Ledger) -> Ledger: ...


@overload
def on_ledger(step: Step, ledger: Build) -> Build: ...


def on_ledger(step: Step, ledger: AnyLedger) -> AnyLedger:
    """The ledger after a step, which changes it as it changes the buffer."""
    match step:
        case Truncate(length):
            return ledger.truncated(length)
        case Shift(start, to, _):
            return ledger.shifted(start, to)
        case Insert(at, skill, replacing):
            if isinstance(ledger, Build):
                return ledger.inserted(at, skill.placed, rounded=skill.rounded, replacing=replacing)
            return ledger.inserted(at, [compiled_run(skill, ledger, at)], replacing=replacing)
        case Recompile(span, units, declared):
            assert isinstance(ledger, Build), "nothing else compiles a skill where it stands"
            return ledger.inserted(span.start, units, rounded=False, replacing=len(span), declared=declared)
        case Exchange(start, middle, stop, _):
            return ledger.exchanged(start, middle, stop)
        case Select():
            return ledger


@overload
def computed(ledger: Ledger, after: Context, computes: Iterable[Compute]) -> Ledger: ...


@overload
def computed(ledger: Build, after: Context, computes: Iterable[Compute]) -> Build: ...


def computed(ledger: AnyLedger, after: Context, computes: Iterable[Compute]) -> AnyLedger:
    """The ledger after these slots were computed in one forward, in ascending order: each reads the slots before it."""
    if isinstance(ledger, Build):
        return ledger.computed(after, [one.span for one in computes])
    for one in computes:
        ledger = ledger.computed(
            one.span.start, after.packed(one.span), after.statements_in(one.span), origin=one.origin,
            partly=bool(one.unread),
        )  # fmt: skip
    return ledger


def weakest_of(ledger: AnyLedger, context: Context) -> TokenState:
    """The weakest state of all cached tokens of a context."""
    if isinstance(ledger, Build):
        return ledger.weakest(context)
    return ledger.weakest(context.values, context.first_places)


def stretches_of(ledger: AnyLedger, context: Context) -> Iterator[Stretch]:
    """The states of all slots of a context, in order."""
    if isinstance(ledger, Build):
        return ledger.stretches(context)
    return ledger.stretches(context.values, context.first_places)


def compiled_run(skill: Skill, ledger: Ledger, at: int) -> Run:
    """The run of a skill that is spliced in at slot `at`.

    If exactly the tokens that it read when it was compiled precede it, the run counts as computed in this context.
    """
    tokens = skill.packed
    statements = tuple((place.tokens.start, place.name, skill.values[place.name]) for place in skill.unit.places)
    if exact_at(skill, ledger, at):
        content = ledger.seen_before(at).content
        return Run(tokens, Version(content, True, ledger.written_before(at)), statements)
    version = Version(Content.of(skill.packed_preface), not skill.rounded, {}, bool(skill.preface))
    return Run(tokens, version, statements, Origin.COMPILED, Content.of())


def exact_at(skill: Skill, ledger: Ledger, at: int) -> bool:
    """Whether the tokens before slot `at` are exactly those that the skill read when it was compiled.

    False for a skill that is kept in fewer bits.
    """
    if skill.rounded or len(skill.packed_preface) != at * TOKEN_BYTES:
        return False
    return ledger.seen_before(at).content.same(Content.of(skill.packed_preface))


def adopted(context: Context, ledger: AnyLedger, unit: Unit, tokens: int) -> tuple[Context, AnyLedger]:
    """The context and ledger with a unit appended whose first `tokens` tokens are already computed in the buffer."""
    whole = context.appended(unit)
    span = Span(len(context), len(context) + tokens)
    return whole, computed(ledger, whole, [Compute(span)]) if tokens else ledger
