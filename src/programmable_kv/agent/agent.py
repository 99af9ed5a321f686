"""An agent on one live cache: composed once, edited when its state changes; each turn computes only new tokens.

agent = Agent(model, "... order_status: {order_status} ...", order_status="pending")
agent.act("Can I still cancel?", ["cancel", "deny"])
agent.act("And now?", ["cancel", "deny"], order_status="shipped")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from programmable_kv.account import Account
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.modes import Mode, parse_mode
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.fields import Value
from programmable_kv.skills.skill import Skill


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: the changes of state before it, and the decision."""

    request: str
    changes: Mapping[str, Value]
    decision: Decision

    @property
    def account(self) -> Account:
        """The cost of the whole turn: the edit, the request, and the answer."""
        total = self.decision.account + self.decision.scoring
        return replace(total, tokens_reused=self.decision.account.tokens_reused)


class Agent:
    """A policy and skills in one context, a state, and a growing trajectory.

    A turn computes its own tokens. A change of state computes what its edit mode requires: by default the field and one
    line about it, or if words for it are declared, the lines that mention it. `notebook` is the live context; later
    turns see what is done to it directly.
    """

    def __init__(
        self,
        model: Model,
        policy: str | Skill,
        values: Mapping[str, Value] | None = None,
        /,
        *,
        skills: Sequence[Skill] = (),
        mode: str | Mode | None = None,
        repair: SeamRepair | None = None,
        fold_system: bool = True,
        visibility: str | Visibility = Visibility.CAUSAL,
        mentions: Mapping[str, Sequence[str]] | None = None,
        **state: Value,
    ) -> None:
        """Compose the context: compiled skills are spliced, and only the rest is computed.

        Args:
            policy: the system message, with a `{field}` placeholder for every name in the state; or a skill, whose own
                fields are the state.
            values, state: the fields' values; fields named like one of the options here go into `values`.
            skills: the skills that follow the policy, in this order, each after an empty line.
            mode: the edit mode for changes of state, as in `Notebook.edit`.
            repair: which tokens of each skill are recomputed in their place.
            fold_system: if the chat template has no place for a system message, the policy begins the first user turn;
                `composed.why` says so.
            visibility: as in `Notebook`. With `design`, changes of state are exact and leave earlier turns as history.
            mentions: field -> the words by which the policy mentions it, as in `Notebook.mentions`. With `design`, it
                is best to give them here, before anything is computed.

        Raises:
            UnknownFieldError, InvalidValueError, InvalidEditError, FingerprintMismatchError, ContextOverflowError: as
                in `Notebook.message` and `Notebook.prefill`.
            UnverifiedError: there is a skill, and this model's keys cannot be relocated exactly.
            TemplateError: the chat template has no place for the policy.
        """
        pieces = [*([policy] if isinstance(policy, Skill) else []), *skills]
        text = "\n\n".join(
            [*([] if isinstance(policy, Skill) else [policy]), *("{" + skill.name + "}" for skill in pieces)]
        )
        self.mode = None if mode is None else parse_mode(mode)
        self.notebook = Notebook(model, fold_system=fold_system, visibility=visibility)
        self.notebook.message("system", text, **{**(values or {}), **state}, **{skill.name: skill for skill in pieces})
        for name, words in (mentions or {}).items():
            self.notebook.mentions(name, *words)
        self.composed = self.notebook.prefill(repair=repair)
        self.turns: list[Turn] = []
        self._between: list[Account] = []

    @property
    def state(self) -> dict[str, str]:
        """Every field's current value."""
        return self.notebook.fields

    def act(
        self,
        request: str,
        options: Sequence[str],
        changes: Mapping[str, Value] | None = None,
        /,
        *,
        think: bool = False,
        **fields: Value,
    ) -> Turn:
        """Apply changes of state and decide on a request, in one forward. Request and answer stay in the context.

        A value equal to the current one costs nothing.

        Raises:
            UnknownFieldError, InvalidValueError, InvalidOptionsError, TemplateError, ContextOverflowError: as in
                `Notebook.decide`; the agent is unchanged.
        """
        given = {**(changes or {}), **fields}
        changed = self.notebook._changed(given)
        decision = self.notebook.decide(request, options, edits=changed, mode=self.mode, think=think, keep=True)
        turn = Turn(request, changed, decision)
        self.turns.append(turn)
        return turn

    def observe(
        self,
        role: str,
        content: str | None = None,
        /,
        *,
        tool_calls: Sequence[Mapping[str, Any]] | None = None,
        tool_call_id: str | None = None,
        name: str | None = None,
    ) -> Account:
        """Append a message from elsewhere, such as a tool's result. Arguments and errors as in `Notebook.add`."""
        return self._noted(
            self.notebook.add(role, content, tool_calls=tool_calls, tool_call_id=tool_call_id, name=name)
        )

    def add_skill(self, skill: Skill, /) -> Account:
        """Splice a skill in at the end of the trajectory, so that the next turns read it."""
        return self._noted(self.notebook.splice(skill))

    def remove_skill(self, name: str, /) -> Account:
        """Cut a skill out. What followed it is relocated, and keeps what it concluded from the skill."""
        return self._noted(self.notebook.cut(name))

    def _noted(self, account: Account) -> Account:
        self._between.append(account)
        return account

    @property
    def account(self) -> Account:
        """The cost of everything so far, including the composition. `tokens_reused` is the last turn's, not a sum."""
        return sum([*self._between, *(turn.account for turn in self.turns)], self.composed)
