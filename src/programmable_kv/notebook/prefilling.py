"""`Notebook.prefill`: the context is computed for the first time, its text and its skills piece by piece."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from programmable_kv.account import Account
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.design.build import Build
from programmable_kv.design.room import without_trailing_room
from programmable_kv.design.units import designed_pieces
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.apply import apply
from programmable_kv.edits.by_design import DesignState, check_repair, plan_design_splice
from programmable_kv.edits.compose import joined_values, plan_append, plan_splice
from programmable_kv.edits.plan import Plan
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.engine import Progress
from programmable_kv.errors import NotPrefilledError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.notebook.state import State
from programmable_kv.prompt.context import Context, FieldValue
from programmable_kv.prompt.fields import TEXT, trusted_by
from programmable_kv.prompt.units import Kind, Unit, tokenised
from programmable_kv.skills.skill import Skill

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook

_SPARE_SLOTS = 128
"""free slots in a new buffer, so that it need not grow for the first tokens that are appended"""

Piece = tuple[Unit, ...] | Skill


def prefill(
    notebook: Notebook, repair: SeamRepair | None, progress: Progress | None
) -> tuple[State, KVBuffer, Account]:
    """Carry out `Notebook.prefill`. Returns the new state, the new cache and the account; the notebook is unchanged."""
    engine, prompt = notebook.model.engine, notebook.prompt
    values = prompt.fields
    for skill in notebook._skills.values():
        values = joined_values(values, skill)
    pieces = _pieces(notebook, repair)
    length = sum(len(piece) if isinstance(piece, Skill) else sum(map(len, piece)) for piece in pieces)
    if not length:
        raise NotPrefilledError("the notebook's text is empty: there is nothing to compute")
    engine.check_length(length)
    if notebook._skills:
        engine.verify()
    buffer = engine.new_buffer(length + _SPARE_SLOTS)
    types = prompt.types
    design = notebook.visibility is Visibility.DESIGN
    fields = {name: FieldValue(it, it, types.get(name, TEXT)) for name, it in values.items()}
    state = State(Context((), fields), Build((), notebook._declared) if design else Ledger())
    total = Account()
    for number, piece in enumerate(pieces):
        plan = _plan(state, piece, repair)
        if design and number == len(pieces) - 1:
            plan = replace(plan, after=without_trailing_room(plan.after))
        before = len(state.context)
        applied = apply(plan, engine, buffer, state.ledger, progress=_offset(progress, before, length))
        state = State(plan.after, applied.ledger)
        total = total + applied.account
    conversation = prompt.conversation()
    told = conversation.remarks if conversation is not None else ""
    reasons = (prompt.remarks, told, trusted_by(types), total.why)
    account = total.of(operation="prefill", tokens_reused=0, why="; ".join(filter(None, reasons)))
    return replace(state, conversation=conversation), buffer, account


def _pieces(notebook: Notebook, repair: SeamRepair | None) -> list[Piece]:
    """The units and skills of the prompt, in order.

    Raises:
        InvalidEditError: a repair recomputes tokens under visibility="design", where skills have no seam.
        UnverifiedError: the notebook has visibility="design" and this model cannot recompute rows in the middle.
    """
    prompt, tokenizer = notebook.prompt, notebook.model.tokenizer
    found: list[Piece] = []
    if notebook.visibility is Visibility.DESIGN:
        check_repair(repair)
        notebook.model.engine.require_rows(instead="Use visibility='causal'.")
        for each in designed_pieces(prompt, tokenizer):
            found.append(notebook._skills[each] if isinstance(each, str) else each)
        return found
    raw = not prompt.messages
    for number, piece in enumerate(prompt.pieces()):
        if isinstance(piece, str):
            found.append(notebook._skills[piece])
        else:
            found.append((tokenised(tokenizer, piece, Kind.PREFILL, special=raw and number == 0),))
    return found


def _plan(state: State, piece: Piece, repair: SeamRepair | None) -> Plan:
    context, ledger = state.context, state.ledger
    if not isinstance(piece, Skill):
        return plan_append(context, *piece, operation="prefill")
    end = Span(len(context), len(context))
    if isinstance(ledger, Build):
        return plan_design_splice(DesignState(context, ledger, len(context)), piece, end)
    return plan_splice(context, ledger, piece, end, repair or SeamRepair())


def _offset(progress: Progress | None, before: int, total: int) -> Progress | None:
    """A callback for one piece that reports progress on the whole context."""
    return None if progress is None else lambda done, _: progress(before + done, total)
