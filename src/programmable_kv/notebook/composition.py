"""Composing a live context: skills spliced in, cut out, moved and exchanged, mid-conversation too.

What follows a change is relocated, so positions stay truthful, and marked stale: it was computed before the change and
still holds what it concluded then. Later turns are computed on the context as it has become.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from programmable_kv.account import Account
from programmable_kv.cache.span import Span
from programmable_kv.edits.splicing import SeamRepair, Spliced, splice
from programmable_kv.errors import InvalidEditError
from programmable_kv.notebook.cached_context import CachedContext
from programmable_kv.prompt.units import Kind, TokenState
from programmable_kv.skills.skill import Skill


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a context, as of now: its kind, a skill's name, and its slots."""

    kind: Kind
    name: str
    span: Span


class Composition(CachedContext):
    """A cached context whose parts can be spliced, cut, moved and exchanged."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The pieces of the context in order."""
        self._filled()
        return tuple(
            Part(unit.kind, unit.name, Span(start, start + len(unit))) for start, unit in self._context.starts()
        )

    def part(self, name: str) -> Part:
        """The skill of that name.

        Raises:
            InvalidEditError: there is none, or more than one: use `parts`.
        """
        found = [part for part in self.parts if part.name == name and name]
        if len(found) != 1:
            known = ", ".join(part.name for part in self.parts if part.name) or "none"
            raise InvalidEditError(
                f"there are {len(found)} skills called {name!r} in this context; its skills are: {known}. Choose from "
                "`.parts` and pass the part itself."
            )
        return found[0]

    def splice(self, skill: Skill, /, *, at: int | Part | None = None, repair: SeamRepair | None = None) -> Account:
        """Put a compiled skill into the live context.

        Args:
            at: the slot (or the part) before which it goes; the context's end when None.
            repair: which of its tokens are computed again in their place.

        Raises:
            UnverifiedError: keys of this model cannot be moved.
            FingerprintMismatchError: another model compiled it.
            InvalidValueError: a value here speaks of a field of the skill's, or one of the skill's of a field here.
            ContextOverflowError: it does not fit.
            InvalidEditError: `at` is no place in the text, or a field of the skill has another value here.
        """
        slot = self._slot(at)
        return self._splice(skill, Span(slot, slot), repair)

    def _splice(self, skill: Skill, where: Span, repair: SeamRepair | None) -> Account:
        self._filled()
        self.model.engine.verify()
        with self._transaction() as meter, meter.measure() as reading:
            done = self._spliced(skill, where, repair)
        return self._account(reading.account, len(self._context) - reading.account.tokens_relocated, done.note)

    def _spliced(self, skill: Skill, where: Span, repair: SeamRepair | None, then: Sequence[int] = ()) -> Spliced:
        """Splice, and compute the tokens `then` at the context's end in the same forward. Within a transaction."""
        buffer = self._filled()
        skill.check_fits(self.model)
        self._check_values(self.fields | dict(skill.values))
        self.model.engine.check_length(buffer.next_position + len(skill) - len(where) + len(then))
        context = self._context.copy()
        done = splice(self.model.engine, buffer, context, skill, where, repair or SeamRepair(), then)
        self._context = context
        return done

    def cut(self, what: str | Part | Span, /) -> Account:
        """Take a part (a skill's name, or a piece of the context) out. What follows is relocated.

        Raises:
            UnverifiedError: keys of this model cannot be moved.
            InvalidEditError: there is no such part, or the span's ends are no places in the text.
        """
        buffer = self._filled()
        span = self._span(what)
        moves = span.stop < len(self._context)
        layout = self.model.engine.require_relocation(below=buffer.next_position) if moves else None
        with self._transaction() as meter, meter.measure() as reading:
            context = self._context.copy()
            first, last = context.split_at(span.start), context.split_at(span.stop)
            if layout is None:
                buffer.truncate(span.start)
            else:
                buffer.relocate(span.stop, len(context), span.start, -len(span), layout)
            del context.units[first:last]
            context.mark_stale(first)
            context.forget_lost_fields()
            self._context = context
        return self._moved(reading.account, span.start)

    def move(self, what: str | Part | Span, /, *, to: int | Part | None = None) -> Account:
        """Move a part before the slot (or part) `to`; to the context's end when None.

        Only what lies between is touched; a part that is there already costs nothing.

        Raises:
            UnverifiedError: keys of this model cannot be moved.
            InvalidEditError: there is no such part, or `to` lies inside it or is no place in the text.
        """
        buffer = self._filled()
        span, slot = self._span(what), self._slot(to)
        if span.start < slot < span.stop:
            raise InvalidEditError(f"cannot move slots [{span.start}, {span.stop}) into themselves, to slot {slot}")
        if slot in (span.start, span.stop):
            return self._account(Account(), len(self._context))
        layout = self.model.engine.require_relocation(below=buffer.next_position)
        with self._transaction() as meter, meter.measure() as reading:
            context = self._context.copy()
            for boundary in sorted({span.start, span.stop, slot}):
                context.split_at(boundary)
            start, stop = min(span.start, slot), max(span.stop, slot)
            first = context.split_at(start)
            moved = list(span.range)
            others = [other for other in range(start, stop) if other not in span.range]
            order = moved + others if slot <= span.start else others + moved
            by_start = dict(context.starts())
            run = [by_start[begins] for begins in order if begins in by_start]
            buffer.reorder(start, order, layout)
            context.units[first : first + len(run)] = run
            context.mark_stale(first)
            self._context = context
        return self._moved(reading.account, start)

    def replace(self, what: str | Part | Span, skill: Skill, /, *, repair: SeamRepair | None = None) -> Account:
        """Exchange a part for a skill, in its place. Raises as `cut` and `splice` do."""
        return self._splice(skill, self._span(what), repair)

    def recompute(self, start: int | Part | None = None) -> Account:
        """Compute everything from a slot (or part) on again, on what precedes it; from the first inexact token when None.

        From the context's first inexact token on, it makes all of it exact for the text as it stands. (A value that is
        stated by an erratum only stays stated by an erratum.)

        Raises:
            InvalidEditError: there is no such slot.
        """
        buffer = self._filled()
        states = self.states
        first = next((slot for slot, state in enumerate(states) if state is not TokenState.EXACT), len(states))
        slot = first if start is None else self._slot(start)
        with self._transaction() as meter, meter.measure() as reading:
            context = self._context.copy()
            context.refreshed = frozenset()
            context.note_computed_from(slot)
            ids = context.ids[slot:]
            if ids:
                buffer.truncate(slot)
                self.model.engine.append(buffer, ids, logits=0)
            self._context = context
        return self._account(reading.account, slot)

    # -- places --------------------------------------------------------------------------------------------------

    def _slot(self, at: int | Part | None) -> int:
        slot = len(self._context) if at is None else at.span.start if isinstance(at, Part) else at
        if not 0 <= slot <= len(self._context):
            raise InvalidEditError(f"there is no slot {slot} in a context of {len(self._context)} tokens")
        return slot

    def _span(self, what: str | Part | Span) -> Span:
        part = self.part(what) if isinstance(what, str) else what
        span = part.span if isinstance(part, Part) else part
        if span.stop > len(self._context) or not len(span):
            raise InvalidEditError(
                f"there are no tokens in slots [{span.start}, {span.stop}) of a context of {len(self._context)}"
            )
        return span

    def _moved(self, account: Account, start: int) -> Account:
        """What followed slot `start` has other text before it now than when it was computed."""
        moved, later = account.tokens_relocated, len(self._context) - start
        note = f"{moved} tokens were relocated; {later} keep what they noted before" if later else ""
        return self._account(account, len(self._context) - moved, note)
