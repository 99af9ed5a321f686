"""What a plan's steps enter into the ledger. Pure: a plan is simulated with these, and `apply` enters the same."""

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
    """What a step does to the ledger: the same as to the buffer."""
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
    """The ledger once these slots were computed, in one forward, ascending: each reads those before it."""
    if isinstance(ledger, Build):
        return ledger.computed(after, [one.span for one in computes])
    for one in computes:
        ledger = ledger.computed(
            one.span.start, after.packed(one.span), after.statements_in(one.span), origin=one.origin
        )
    return ledger


def weakest_of(ledger: AnyLedger, context: Context) -> TokenState:
    """The state of all cached tokens of a context taken together."""
    if isinstance(ledger, Build):
        return ledger.weakest(context)
    return ledger.weakest(context.values, context.first_places)


def stretches_of(ledger: AnyLedger, context: Context) -> Iterator[Stretch]:
    """The states of all slots of a context, in order."""
    if isinstance(ledger, Build):
        return ledger.stretches(context)
    return ledger.stretches(context.values, context.first_places)


def compiled_run(skill: Skill, ledger: Ledger, at: int) -> Run:
    """A skill that goes into slot `at`, as a run.

    Right behind exactly the tokens that it read while it was compiled, it counts as computed here.
    """
    tokens = skill.packed
    statements = tuple((place.tokens.start, place.name, skill.values[place.name]) for place in skill.unit.places)
    if exact_at(skill, ledger, at):
        content = ledger.seen_before(at).content
        return Run(tokens, Version(content, True, ledger.written_before(at)), statements)
    version = Version(Content.of(skill.packed_preface), not skill.rounded, {}, bool(skill.preface))
    return Run(tokens, version, statements, Origin.COMPILED, Content.of())


def exact_at(skill: Skill, ledger: Ledger, at: int) -> bool:
    """Whether what precedes slot `at` is, token for token, what the skill read while it was compiled."""
    if skill.rounded or len(skill.packed_preface) != at * TOKEN_BYTES:
        return False
    return ledger.seen_before(at).content.same(Content.of(skill.packed_preface))


def adopted(context: Context, ledger: AnyLedger, unit: Unit, tokens: int) -> tuple[Context, AnyLedger]:
    """A context with a unit after its end, whose first `tokens` tokens are in the buffer: computed there on this context."""
    whole = context.appended(unit)
    span = Span(len(context), len(context) + tokens)
    return whole, computed(ledger, whole, [Compute(span)]) if tokens else ledger
