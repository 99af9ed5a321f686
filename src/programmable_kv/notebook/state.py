"""The immutable state of a notebook: the context as written, the ledger of what is cached, and the conversation."""

from __future__ import annotations

from dataclasses import dataclass, field

from programmable_kv.cache.buffer import Mark
from programmable_kv.cache.span import Span
from programmable_kv.design.build import AnyLedger
from programmable_kv.edits.entries import stretches_of, weakest_of
from programmable_kv.errors import InvalidArgumentError, UnknownPartError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.units import Kind
from programmable_kv.states import TokenState, weakest


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a context: its kind, its name if it is a skill, its slots, its text, and its state."""

    kind: Kind
    name: str
    span: Span
    text: str = field(repr=False)
    state: TokenState
    """the weakest of its tokens"""
    superseded: bool = False
    """whether this is an erratum whose value is no longer the field's current one"""


@dataclass(frozen=True, slots=True)
class State:
    """Context, ledger and conversation, which are always replaced together."""

    context: Context = field(default_factory=Context)
    ledger: AnyLedger = field(default_factory=Ledger)
    conversation: Conversation | None = None
    """the chat messages; None for raw text"""

    @property
    def weakest(self) -> TokenState:
        """The weakest state of all cached tokens."""
        return weakest_of(self.ledger, self.context)

    def token_states(self) -> list[TokenState]:
        """The state of every slot, in order."""
        states: list[TokenState] = []
        for stretch in stretches_of(self.ledger, self.context):
            states += [stretch.state] * len(stretch.span)
        return states

    def parts(self) -> tuple[Part, ...]:
        """The parts in order. A skill is one part; under visibility="design" so is a field's value in the prompt."""
        states = self.token_states()
        context = self.context
        found = []
        for group in context.groups:
            unit, span = context.units[group.start], context.slots_of(group)
            state = weakest(set(states[span.start : span.stop]))
            found.append(
                Part(unit.kind, unit.name, span, context.text_of(group), state, context.superseded(group.start))
            )
        return tuple(found)

    # -- places that a caller names ------------------------------------------------------------------------------------

    def slot(self, at: int | Part | None) -> int:
        """The slot that `at` names: the slot itself, the first slot of a part, or the context's end for None.

        Raises:
            UnknownPartError: the context has no such slot, or the part no longer stands at its slots.
            InvalidArgumentError: `at` is neither a slot nor a part.
        """
        if isinstance(at, Part):
            return self._current(at).start
        if at is None:
            return len(self.context)
        if isinstance(at, bool) or not isinstance(at, int):
            raise InvalidArgumentError(f"a place is a slot number, a part of .parts, or None for the end; got {at!r}")
        if not 0 <= at <= len(self.context):
            raise UnknownPartError(f"there is no slot {at} in a context of {len(self.context)} tokens")
        return at

    def span(self, what: str | Part | Span) -> Span:
        """The slots that `what` names: those of a spliced skill (by name), of a part, or the span itself.

        Raises:
            UnknownPartError: the context has no such part, or it has no tokens.
            InvalidArgumentError: `what` is not a name, a part or a span.
        """
        if isinstance(what, str):
            named = self.skill_named(what)
            if not len(named):
                raise UnknownPartError(f"the skill {what!r} has no tokens now: edit its field instead")
            return named
        if isinstance(what, Part):
            if not len(self._current(what)):
                raise UnknownPartError(
                    f"the {what.kind} part at slot {what.span.start} has no tokens: edit its field instead"
                )
            return what.span
        if not isinstance(what, Span):
            raise InvalidArgumentError(f"a part is a skill's name, a part of .parts, or a Span; got {what!r}")
        if what.stop > len(self.context) or not len(what):
            raise UnknownPartError(
                f"there are no tokens in slots [{what.start}, {what.stop}) of a context of {len(self.context)}"
            )
        return what

    def skill_named(self, name: str) -> Span:
        """The slots of the skill of this name.

        Raises:
            UnknownPartError: the context has no skill of that name, or several: pass one of `.parts` instead.
        """
        context = self.context
        named = [(context.units[group.start].name, context.slots_of(group)) for group in context.groups]
        found = [span for known, span in named if known == name]
        if len(found) > 1:
            raise UnknownPartError(
                f"{len(found)} skills are called {name!r} in this context. Choose from `.parts` and pass the part itself."
            )
        if not found:
            known = ", ".join(filter(None, (known for known, _ in named)))
            its = f"its skills are: {known}" if known else "it has none"
            raise UnknownPartError(f"there is no skill {name!r} in this context; {its}")
        return found[0]

    def _current(self, part: Part) -> Span:
        """The part's slots, checked: the part must still stand there."""
        context = self.context
        stands = any(
            context.starts[group.start] == part.span.start
            and (context.units[group.start].kind, context.units[group.start].name) == (part.kind, part.name)
            and context.text_of(group) == part.text
            for group in context.groups
        )
        if not stands:
            raise UnknownPartError(
                f"the {part.kind} part in slots [{part.span.start}, {part.span.stop}) is no longer there: the context has "
                "changed since. Take it from `.parts` again."
            )
        return part.span


@dataclass(frozen=True, slots=True)
class NotebookMark:
    """A state of a notebook that can be returned to."""

    buffer: Mark
    state: State
