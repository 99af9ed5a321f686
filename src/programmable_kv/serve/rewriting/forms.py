"""Chooses the forms in which a line may stand at the end of a request: those known to reach the model, best first."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES, Prompt, is_reasoned

FORMS = {
    CHAT: (Form.SYSTEM, Form.USER, Form.INLINE),
    RESPONSES: (Form.SYSTEM, Form.USER, Form.INLINE),
    MESSAGES: (Form.SYSTEM, Form.INLINE),  # it merges two user turns in a row: a block does the same
}
"""The forms that a line may have in each protocol, the best first."""
REFUSED = ("refused", "folded")
INTACT, LOST = "intact", "lost"
"""What a rendering showed: everything is there, once and in order; or something is missing, repeated or misplaced."""


class LineRole(StrEnum):
    """The role in which lines are sent."""

    AUTO = "auto"
    """As system or user messages if the upstream's rendering shows that they reach the model; else in user messages."""
    SYSTEM = "system"
    """As system messages: the upstream's maker says that a conversation may contain them."""
    USER = "user"
    """As user messages."""
    INLINE = "inline"
    """As the last paragraph of the newest user message, and nowhere else."""


_ALLOWED = {
    LineRole.SYSTEM: (Form.SYSTEM, Form.USER, Form.INLINE),
    LineRole.USER: (Form.USER, Form.INLINE),
    LineRole.INLINE: (Form.INLINE,),
}


def forms_of(prompt: Prompt, verdicts: Mapping[str, str], role: LineRole) -> tuple[Form, ...]:
    """The forms that a new line at the end of a request may have.

    A template may drop or move a message, and the answer still looks like any other. So a line that is a message of its
    own needs a proof. Behind a tool result there is no user message that a line could be added to. There a user message
    is sent unless a rendering lost it, because every chat template writes what a user says. But many templates show the
    model's reasoning only behind the last user message, so if there is reasoning, that needs a proof too.
    """
    behind = is_behind_tool(prompt)
    return tuple(form for form in FORMS[prompt.route] if _may_stand(form, prompt, verdicts, role, behind=behind))


def open_to_lines(prompt: Prompt, verdicts: Mapping[str, str], role: LineRole) -> bool:
    """Whether a line may follow a user message, now or later in the conversation."""
    return any(_may_stand(form, prompt, verdicts, role, behind=False) for form in FORMS[prompt.route])


def lost_forms(prompt: Prompt, verdicts: Mapping[str, str]) -> frozenset[Form]:
    """The forms whose earlier lines do not reach the model, as a rendering showed."""
    return frozenset(form for form in FORMS[prompt.route] if _rendering(form, prompt, verdicts) == LOST)


def about(form: Form, *, behind_tool: bool = False) -> str:
    """The name of the verdict on whether the upstream takes a form."""
    return f"line as {form}{' behind a tool result' if behind_tool else ''}"


def about_rendering(role: str, *, tools: bool) -> str:
    """The name of the verdict that a rendering showed.

    Args:
        role: the role of the line's own message.
        tools: whether the conversation has tools: a model may have another template for them.
    """
    return f"line as {role}{' beside tools' if tools else ''}, rendered"


def about_reasoning(role: str) -> str:
    """The name of the verdict on whether earlier reasoning stays when a line in a role follows a tool result."""
    return f"line as {role} behind a tool result, reasoning rendered"


def is_behind_tool(prompt: Prompt) -> bool:
    """Whether a new line would stand behind a tool result that is a message of its own."""
    return prompt.units[-1].role == "tool"


def head_role(prompt: Prompt) -> str:
    """The role of the system prompt. A line with the authority of the system prompt has the same role."""
    return prompt.head[-1].role if prompt.head else "system"


def _may_stand(form: Form, prompt: Prompt, verdicts: Mapping[str, str], role: LineRole, *, behind: bool) -> bool:
    if any(verdicts.get(about(form, behind_tool=where)) in REFUSED for where in {False, behind}):
        return False
    if behind and _may_hide(form, role) and is_reasoned(prompt):
        kept = _rendered(about_reasoning(_role(form, prompt)), prompt, verdicts)
        if kept != INTACT:
            return False
    if role is not LineRole.AUTO:
        return form in _ALLOWED[role]
    if form is Form.INLINE:
        return True
    rendered = _rendering(form, prompt, verdicts)
    return rendered == INTACT or (form is Form.USER and behind and rendered != LOST)


def _may_hide(form: Form, role: LineRole) -> bool:
    """Whether a line may hide what stands before it. An operator's setting `user` says only that a line arrives."""
    return form is Form.USER or (form is Form.SYSTEM and role is LineRole.AUTO)


def _rendering(form: Form, prompt: Prompt, verdicts: Mapping[str, str]) -> str:
    """What a rendering showed about a form; empty if there was none, or the request brings its own template."""
    if form is Form.INLINE:
        return ""
    return _rendered(about_rendering(_role(form, prompt), tools=_has_tools(prompt)), prompt, verdicts)


def _rendered(what: str, prompt: Prompt, verdicts: Mapping[str, str]) -> str:
    return "" if prompt.body.data.get("chat_template") else verdicts.get(what, "")


def _role(form: Form, prompt: Prompt) -> str:
    """The role of a line's own message."""
    return head_role(prompt) if form is Form.SYSTEM else "user"


def _has_tools(prompt: Prompt) -> bool:
    return bool(prompt.body.data.get("tools")) or any(unit.role == "tool" for unit in prompt.turns)
