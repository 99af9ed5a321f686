"""Editing a cached context: a field gets another value, in one of the modes of `edits.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from programmable_kv.account import Account
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.edits.plan import DEFAULT_MODE, REFRESHES_FIELD, EditPlan, Mode, plan_edit
from programmable_kv.engine import Rows
from programmable_kv.errors import ContextOverflowError, InvalidEditError, TemplateError
from programmable_kv.ledger.context import Context
from programmable_kv.notebook.composition import Composition
from programmable_kv.prompt.parts import Message, Rendered, Text
from programmable_kv.prompt.units import Kind, Unit, tokenised
from programmable_kv.prompt.values import check_value
from programmable_kv.prompt.wording import statement

_ERRATUM_ROLES = ("system", "user")


class Editing(Composition):
    """A cached context whose fields can be edited."""

    def edit(
        self,
        changes: Mapping[str, str] | None = None,
        /,
        *,
        mode: str | Mode = DEFAULT_MODE,
        k: int = 32,
        **fields: str,
    ) -> Account:
        """Give fields new values: `edit(order_status="pending")`, or a mapping for names that are no keywords.

        Args:
            mode: one of `Mode`.
            k: for `selective`, how many later tokens to recompute besides the field's own.

        Raises:
            UnknownFieldError, InvalidValueError, InvalidEditError: the edit is not one.
            ContextOverflowError: the new value or the erratum does not fit.
            UnverifiedError: the value's token length changes and this model's keys cannot be relocated.
        """
        chosen = parse_mode(mode)
        self._prepare(chosen)
        with self._transaction() as meter, meter.measure() as reading:
            done = self._edit({**(changes or {}), **fields}, chosen, k)
        return self._account(reading.account, done.reused, done.note)

    def _prepare(self, mode: Mode) -> None:
        """Have the model's checks done once, before any clock runs: they are no part of an operation's price."""
        if mode in REFRESHES_FIELD:
            self.model.engine.verify()

    def _edit(
        self, changes: Mapping[str, str], mode: Mode, k: int, then: Sequence[int] = (), logits: int = 0
    ) -> Edited:
        """Carry out an edit and compute the tokens `then` after it, in one forward. Logits are of the last rows."""
        buffer = self._filled()
        self._require_known(changes)
        if not changes:
            raise InvalidEditError("the edit names no field; give at least one, as field=value")
        for name, value in changes.items():
            check_value(name, value, self.model.tokenizer, self.erratum_template, self._context.fields)
        plan, after = plan_edit(
            self._context, changes, mode, tokenizer=self.model.tokenizer, write_erratum=self._erratum
        )
        if plan.relocates:
            reach = max(buffer.next_position, len(after) + len(then))
            layout = self.model.engine.require_relocation(below=reach)
        if mode in REFRESHES_FIELD and plan.compute and plan.compute != tuple(range(plan.compute[0], len(after))):
            self.model.engine.require_rows()
        limit = self.model.position_limit
        if limit is not None and len(after) + len(then) > limit:
            raise ContextOverflowError(
                f"after this edit the context needs {len(after) + len(then)} positions, and the model has {limit}. Use a "
                "shorter value, or start a new notebook."
            )
        extra: set[int] = set()
        if mode is Mode.SELECTIVE:
            extra = self._most_influential(buffer, plan, after, changes, then, k)
        buffer.truncate(plan.keep)
        for move in plan.moves:
            buffer.relocate(move.start, buffer.length, move.to, move.to - move.start, layout)
        slots = sorted({*plan.compute, *extra})
        if mode is Mode.SELECTIVE:
            after.refreshed = frozenset(extra)
            after.note_computed(extra)
        rows = _rows(buffer, after.ids, slots)
        end = rows.positions[-1] + 1 if rows.slots and rows.slots[-1] == len(after) - 1 else buffer.next_position
        rows = rows.then(Rows.appended(then, len(after), end))
        output = None
        if rows.slots:
            output = self.model.engine.compute(buffer, rows, logits=min(logits, len(rows)))
        self._context = after
        moved = {slot for move in plan.moves for slot in range(move.to, len(after))}
        return Edited(output, len(after) - len(moved.union(slots)), plan.note)

    def _most_influential(
        self, buffer: KVBuffer, plan: EditPlan, after: Context, changes: Mapping[str, str], then: Sequence[int], k: int
    ) -> set[int]:
        """The k later slots (as of after the edit) that the ranking puts first."""
        if k < 1:
            raise InvalidEditError(f"selective needs k >= 1, got {k}; for the field alone use mode='in_place'")
        reader = Rows.appended(then, buffer.length, buffer.next_position)
        if not then:  # nothing is asked yet: the context's last token reads
            last = buffer.length - 1
            reader = Rows((self._context.ids[last],), (last,), (int(buffer.positions[last]),))
        scores = self.ranking.scores(self.model.engine, buffer, reader)
        growth = sum(move.to - move.start for move in plan.moves)
        first = min(after.first_place(name) for name in changes) - 1
        own = {*plan.compute, *(slot for name in changes for span in after.spans(name) for slot in span.range)}
        shifts = sorted((move.start, move.to - move.start) for move in plan.moves)
        candidates = []
        for slot in range(plan.keep):
            target = slot + sum(shift for start, shift in shifts if slot >= start)
            if target not in own and first < target < plan.keep + growth:
                candidates.append((float(scores[slot]), target))
        return {target for _, target in sorted(candidates, reverse=True)[:k]}

    def _erratum(self, context: Context, name: str, value: str) -> Unit:
        line = statement(self.erratum_template, name, value)
        if not self._messages:
            rendered = Rendered(line + "\n" if context.text.endswith("\n") else f"\n{line}\n")
        else:
            rendered = self._erratum_message(line)
        return tokenised(self.model.tokenizer, rendered, Kind.ERRATUM, corrects=((name, value),))

    def _erratum_message(self, line: str) -> Rendered:
        """The line as a message of its own, in the first role that the chat template takes there."""
        for role in _ERRATUM_ROLES:
            try:
                return self._continuation([Message(role, Text(line))])
            except TemplateError as error:
                refused = error
        raise TemplateError(
            f"the chat template takes no update at this point, neither as a system nor as a user message ({refused}). Use "
            "mode='suffix', which appends nothing; or build the notebook from raw text."
        )


@dataclass(frozen=True, slots=True)
class Edited:
    """An edit that was carried out: the logits asked for, the tokens it left alone, and what it did beyond the asked."""

    logits: torch.Tensor | None
    reused: int
    note: str


def parse_mode(mode: str | Mode) -> Mode:
    """
    Raises:
        InvalidEditError: there is no such mode; the message lists them.
    """
    try:
        return Mode(mode)
    except ValueError:
        raise InvalidEditError(f"there is no edit mode {mode!r}; the modes are: {', '.join(Mode)}") from None


def _rows(buffer: KVBuffer, ids: Sequence[int], slots: Sequence[int]) -> Rows:
    """Rows for some slots. A replaced or appended slot stands one position after the slot before it."""
    positions: dict[int, int] = {}
    for slot in slots:
        before = positions.get(slot - 1, int(buffer.positions[slot - 1]) if 0 < slot <= buffer.length else -1)
        positions[slot] = before + 1 if slot else 0
    return Rows(tuple(ids[slot] for slot in slots), tuple(slots), tuple(positions.values()))
