"""`notebook.plan`: plans of operations, made without carrying them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from programmable_kv.arguments import require, require_count, require_fields
from programmable_kv.cache.span import Span
from programmable_kv.design.build import Build
from programmable_kv.edits import by_design
from programmable_kv.edits.compose import plan_append, plan_cut, plan_move, plan_splice
from programmable_kv.edits.edit import EditTools, plan_edit, plan_rebase, plan_recompute
from programmable_kv.edits.modes import STRATEGIES, Mode, parse_mode
from programmable_kv.edits.plan import Plan
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.errors import (
    InvalidArgumentError,
    InvalidEditError,
    TemplateError,
    UnverifiedError,
)
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.notebook.state import Part
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.fields import FieldKind, Value, edited, trusted_by
from programmable_kv.prompt.guard import check_text
from programmable_kv.prompt.parts import Message, Rendered, Text
from programmable_kv.prompt.prompt import check_values
from programmable_kv.prompt.readers import Turns, parse_turns
from programmable_kv.prompt.tokens import as_text
from programmable_kv.prompt.turns import turn_slots
from programmable_kv.prompt.units import Kind, Unit, tokenised
from programmable_kv.prompt.wording import block_statement, statement
from programmable_kv.skills.skill import Skill

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook

_ERRATUM_ROLES = ("system", "user")
IN_FIRST_TURN = "the context ends where the first user turn begins, so the erratum is part of that turn"
AS_USER = "the chat template takes no system message at this point, so the erratum is a user message"
INSERTED = (
    "the chat template takes neither a system nor a second user message at this point, so the erratum is inserted in "
    "the form of a user message"
)


class Plans:
    """Plans of a notebook's operations. Each method takes the arguments of the `Notebook` method of the same name.

    It raises the same errors, and the notebook is unchanged. Print a plan to see its steps, tokens and bytes.
    """

    def __init__(self, notebook: Notebook) -> None:
        self._notebook = notebook

    def edit(
        self,
        changes: Mapping[str, Value] | None = None,
        /,
        *,
        mode: str | Mode | None = None,
        k: int = 32,
        turns: str = "open",
        **fields: Value,
    ) -> Plan:
        """Plan `Notebook.edit`."""
        require(changes, (Mapping, type(None)), "changes are a mapping of fields to values")
        state = self._notebook._ready()
        chosen = None if mode is None else parse_mode(mode)
        wanted = parse_turns(turns)
        if isinstance(k, bool) or not isinstance(k, int):
            raise InvalidArgumentError(f"k is a whole number of tokens, got {k!r}")
        given = {**(changes or {}), **fields}
        require_fields(given, state.context.fields)
        if not given:
            raise InvalidEditError("the edit names no field; give at least one, as field=value")
        texts, types = edited(given, state.context.types)
        for name, text in texts.items():
            check_text(
                name,
                text,
                types[name],
                self._notebook.model.tokenizer,
                self._notebook.erratum_template,
                state.context.fields,
            )
        if chosen is None or STRATEGIES[chosen].writes:
            # The model is checked once, before any measurement starts: the checks are not part of an edit's cost.
            self._notebook.model.engine.verify()
        if (design := self._design()) is not None:
            tokenizer = self._notebook.model.tokenizer
            return by_design.plan_design_edit(design, texts, chosen, wanted, tokenizer).because(trusted_by(types))
        assert isinstance(state.ledger, Ledger)
        notes: dict[str, str] = {}
        plan = plan_edit(state.context, state.ledger, texts, chosen, self._tools(k, notes, wanted))
        return _explained(plan, notes).because(trusted_by(types))

    def splice(self, skill: Skill, /, *, at: int | Part | None = None, repair: SeamRepair | None = None) -> Plan:
        """Plan `Notebook.splice`."""
        slot = self._notebook._ready().slot(at)
        return self._splice(skill, Span(slot, slot), repair, "splice")

    def replace(self, what: str | Part | Span, skill: Skill, /, *, repair: SeamRepair | None = None) -> Plan:
        """Plan `Notebook.replace`."""
        return self._splice(skill, self._notebook._ready().span(what), repair, "replace")

    def _splice(self, skill: Skill, where: Span, repair: SeamRepair | None, operation: str) -> Plan:
        state, model = self._notebook._ready(), self._notebook.model
        require(repair, (SeamRepair, type(None)), "a repair is a SeamRepair, or None")
        if not isinstance(skill, Skill):
            raise InvalidArgumentError(
                f"only a Skill can be spliced, got {type(skill).__name__}: make one with Skill.compile"
            )
        skill.check_fits(model)
        values = state.context.values | dict(skill.values)
        check_values(
            model.tokenizer, self._notebook.erratum_template, values, {**dict(skill.types), **state.context.types}
        )
        model.engine.verify()
        if (design := self._design()) is not None:
            by_design.check_repair(repair)
            return by_design.plan_design_splice(design, skill, where, operation=operation)
        assert isinstance(state.ledger, Ledger)
        return plan_splice(
            state.context,
            state.ledger,
            skill,
            where,
            repair or SeamRepair(),
            self._bytes_per_token,
            operation=operation,
        )

    def cut(self, what: str | Part | Span, /) -> Plan:
        """Plan `Notebook.cut`."""
        state = self._notebook._ready()
        if (design := self._design()) is not None:
            return by_design.plan_design_cut(design, state.span(what))
        return plan_cut(state.context, state.span(what), self._bytes_per_token)

    def move(self, what: str | Part | Span, /, *, to: int | Part | None = None) -> Plan:
        """Plan `Notebook.move`."""
        state = self._notebook._ready()
        if (design := self._design()) is not None:
            return by_design.plan_design_move(design, state.span(what), state.slot(to))
        return plan_move(state.context, state.span(what), state.slot(to), self._bytes_per_token)

    def recompute(self, start: int | Part | None = None) -> Plan:
        """Plan `Notebook.recompute`."""
        state = self._notebook._ready()
        slot = None if start is None else state.slot(start)
        if (design := self._design()) is not None:
            return by_design.plan_design_recompute(design, slot)
        assert isinstance(state.ledger, Ledger)
        return plan_recompute(state.context, state.ledger, slot, self._bytes_per_token)

    def rebase(self, *, limit: int | None = None) -> Plan:
        """Plan `Notebook.rebase`."""
        if limit is not None:
            require_count(limit, "limit")
        state = self._notebook._ready()
        if not isinstance(state.ledger, Ledger):  # under visibility="design" edits append no errata
            return Plan("rebase", len(state.context), state.context, why="there is no erratum to fold back")
        return plan_rebase(state.context, state.ledger, self._tools(), limit)

    def append(self, unit: Unit) -> Plan:
        """Plan to append a unit that is already tokenised."""
        return plan_append(self._notebook._ready().context, unit, bytes_per_token=self._bytes_per_token)

    def _design(self) -> by_design.DesignState | None:
        """What a plan under visibility="design" starts from; None in a causal notebook."""
        state = self._notebook._ready()
        if not isinstance(state.ledger, Build):
            return None
        opens = turn_slots(state.context, state.conversation, "").open
        return by_design.DesignState(state.context, state.ledger, opens, self._bytes_per_token)

    # -- what planning needs -------------------------------------------------------------------------------------------

    @property
    def _bytes_per_token(self) -> int:
        return self._notebook.cache.bytes_per_token

    def _tools(self, k: int = 32, notes: dict[str, str] | None = None, turns: Turns = Turns.OPEN) -> EditTools:
        """`notes` gets, for the text of each erratum, why it is not a system message."""
        notebook = self._notebook

        def write(context: Context, name: str, value: str, known: str | None) -> Unit:
            unit, why = self._erratum(context, name, value, known)
            if notes is not None and why:
                notes[unit.text] = why
            return unit

        return EditTools(
            notebook.model.tokenizer, write, self._can_relocate, notebook.ranking, k, self._bytes_per_token,
            lambda context, name, words: notebook._readers_in(context, name, turns, words), notebook._declared.words.keys(),
            self._can_hide,
        )  # fmt: skip

    def _can_hide(self) -> bool:
        return not self._notebook._lines_read_fields and _passes(self._notebook.model.engine.require_rows)

    def _can_relocate(self) -> bool:
        below = self._notebook.cache.next_position
        return _passes(lambda: self._notebook.model.engine.require_relocation(below=below))

    def _erratum(self, context: Context, name: str, value: str, known: str | None) -> tuple[Unit, str]:
        """The unit that states a value at the context's end, and why it is not a system message (empty if it is).

        `known`: the value that all readers know, if there is one.
        """
        kind, template = context.fields[name].type, self._notebook.erratum_template
        told = kind.told(value)
        if kind.kind is FieldKind.BLOCK:
            line = block_statement(template, name, told, None if known is None else kind.told(known))
        else:
            line = statement(template, name, told)
        line = as_text(line, self._notebook.model.tokenizer, f"the erratum about {name}")
        conversation = self._notebook._ready().conversation
        why = ""
        if conversation is not None:
            text, why = erratum_message(conversation, line)
        else:
            text = line + "\n" if context.ends_with().endswith("\n") else f"\n{line}\n"
        unit = tokenised(self._notebook.model.tokenizer, Rendered(text), Kind.ERRATUM, corrects=((name, value),))
        return unit, why


def erratum_message(conversation: Conversation, line: str) -> tuple[str, str]:
    """The text of an erratum in the form that the chat template takes here, and why it is not a system message.

    The forms are tried in this order: at the beginning of the first user turn, if the context ends there; as a system
    message; as a user message; in the form that the template has for a user message after an answer.

    Raises:
        TemplateError: in none of these forms does the line stand once and in its place.
    """
    if conversation.opens_turn:
        return f"{line}\n\n", IN_FIRST_TURN
    refused: list[str] = []
    for role in _ERRATUM_ROLES if conversation.template.takes_system else _ERRATUM_ROLES[1:]:
        try:
            continuation = conversation.continued([Message(role, Text(line))])
        except TemplateError as error:
            refused.append(str(error))
        else:
            return continuation.added, AS_USER if role == "user" else ""
    try:
        text = conversation.inserted(Message("user", Text(line)))
    except TemplateError:
        raise TemplateError(
            f"the chat template takes no update at this point, neither as a system nor as a user message ({refused[-1]}). Use "
            "mode='suffix', which appends nothing; or build the notebook from raw text."
        ) from None
    return text, INSERTED


def _explained(plan: Plan, notes: Mapping[str, str]) -> Plan:
    """The plan, with the reasons why some of its errata are not system messages."""
    placed = [notes[unit.text] for unit in plan.after.units if unit.kind is Kind.ERRATUM and unit.text in notes]
    why = "; ".join(dict.fromkeys([*filter(None, [plan.why]), *placed]))
    return replace(plan, why=why)


def _passes(require: Callable[[], object]) -> bool:
    """Whether the model passes a check that raises if it does not."""
    try:
        require()
    except UnverifiedError:
        return False
    return True
