"""What a notebook is in: the context as written, the ledger of what is cached of it, and the conversation. Immutable."""

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
    """A piece of a context: its kind, a skill's name, its slots, its text, and its state."""

    kind: Kind
    name: str
    span: Span
    text: str = field(repr=False)
    state: TokenState
    """the weakest of its tokens"""
    superseded: bool = False
    """an erratum whose value is no longer the field's"""


@dataclass(frozen=True, slots=True)
class State:
    """Context, ledger and conversation; replaced as one."""

    context: Context = field(default_factory=Context)
    ledger: AnyLedger = field(default_factory=Ledger)
    conversation: Conversation | None = None
    """the chat messages; None for raw text"""

    @property
    def weakest(self) -> TokenState:
        """The state of all cached tokens taken together."""
        return weakest_of(self.ledger, self.context)

    def token_states(self) -> list[TokenState]:
        """Of every slot."""
        states: list[TokenState] = []
        for stretch in stretches_of(self.ledger, self.context):
            states += [stretch.state] * len(stretch.span)
        return states

    def parts(self) -> tuple[Part, ...]:
        """The context's pieces in order. A skill is one, a value of a prompt that is read by design is one, too."""
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
        """The slot before which something goes: a slot, a part's beginning, or the end for None.

        Raises:
            UnknownPartError: there is no such slot, or the part no longer stands where it did.
            InvalidArgumentError: neither slot nor part.
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
        """The slots of a spliced skill (by name), a part, or a span that holds tokens.

        Raises:
            UnknownPartError: there is no such part, or no token there.
            InvalidArgumentError: none of these.
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
        """
        Raises:
            UnknownPartError: there is no skill of that name, or more than one: use a part of `.parts`.
        """
        context = self.context
        named = [(context.units[group.start].name, context.slots_of(group)) for group in context.groups]
        found = [span for known, span in named if known == name]
        if len(found) != 1:
            if found:
                raise UnknownPartError(
                    f"{len(found)} skills are called {name!r} in this context. Choose from `.parts` and pass the part itself."
                )
            known = ", ".join(filter(None, (known for known, _ in named)))
            raise UnknownPartError(
                f"there is no skill {name!r} in this context; "
                + (f"its skills are: {known}" if known else "it has none")
            )
        return found[0]

    def _current(self, part: Part) -> Span:
        """The part's slots, if it still stands there."""
        context = self.context
        stands = any(
            context.starts[group.start] == part.span.start
            and (context.units[group.start].kind, context.units[group.start].name) == (part.kind, part.name)
            and context.text_of(group) == part.text
            for group in context.groups
        )
        if not stands:
            raise UnknownPartError(
                f"the {part.kind} part of slots [{part.span.start}, {part.span.stop}) no longer stands there: the context has "
                "changed since. Take it from `.parts` again."
            )
        return part.span


@dataclass(frozen=True, slots=True)
class NotebookMark:
    """A state of a notebook that can be returned to."""

    buffer: Mark
    state: State
