"""In which forms a line may stand at the end of a request: those in which it is known to reach the model, the best first."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES, Prompt, is_reasoned

FORMS = {
    CHAT: (Form.SYSTEM, Form.USER, Form.INLINE),
    RESPONSES: (Form.SYSTEM, Form.USER, Form.INLINE),
    MESSAGES: (Form.SYSTEM, Form.INLINE),  # two user turns in a row are one there: a block does the same
}
"""in which forms a line may stand, the best first"""
REFUSED = ("refused", "folded")
INTACT, LOST = "intact", "lost"
"""what a rendering showed: everything is there, once and in its order; or something is not"""


class LineRole(StrEnum):
    """In which role lines are sent."""

    AUTO = "auto"
    """as system or user messages where a rendering of the upstream's showed that they reach the model; else in user messages"""
    SYSTEM = "system"
    """as system messages: the upstream's maker says that they may stand in a conversation"""
    USER = "user"
    """as user messages"""
    INLINE = "inline"
    """as the last paragraph of the newest user message, and nowhere else"""


_ALLOWED = {
    LineRole.SYSTEM: (Form.SYSTEM, Form.USER, Form.INLINE),
    LineRole.USER: (Form.USER, Form.INLINE),
    LineRole.INLINE: (Form.INLINE,),
}


def forms_of(prompt: Prompt, verdicts: Mapping[str, str], role: LineRole) -> tuple[Form, ...]:
    """The forms of a new line at the end of a request.

    A template may drop a message, or put it somewhere else, and the answer is an ordinary one. So a message of its own needs a
    proof. Behind a tool's result there is no user message that a line could be part of: a user message is sent there unless a
    rendering lost it, because every chat template writes what a user says. But many show the model's reasoning only behind
    the last user message: where there is reasoning, that needs a proof too.
    """
    behind = is_behind_tool(prompt)
    return tuple(form for form in FORMS[prompt.route] if _may_stand(form, prompt, verdicts, role, behind=behind))


def open_to_lines(prompt: Prompt, verdicts: Mapping[str, str], role: LineRole) -> bool:
    """Whether a line may stand behind what a user says, now or later in the conversation."""
    return any(_may_stand(form, prompt, verdicts, role, behind=False) for form in FORMS[prompt.route])


def lost_forms(prompt: Prompt, verdicts: Mapping[str, str]) -> frozenset[Form]:
    """Forms of which a rendering showed that earlier lines do not reach the model."""
    return frozenset(form for form in FORMS[prompt.route] if _rendering(form, prompt, verdicts) == LOST)


def about(form: Form, *, behind_tool: bool = False) -> str:
    """Under what name it is remembered whether the upstream takes a form."""
    return f"line as {form}{' behind a tool result' if behind_tool else ''}"


def about_rendering(role: str, *, tools: bool) -> str:
    """Under what name it is remembered what a rendering showed.

    Args:
        role: of the message that the line is.
        tools: whether the conversation has tools: a model may have another template for those.
    """
    return f"line as {role}{' beside tools' if tools else ''}, rendered"


def about_reasoning(role: str) -> str:
    """Under what name it is remembered whether a line in a role behind a tool's result leaves the reasoning before it there."""
    return f"line as {role} behind a tool result, reasoning rendered"


def is_behind_tool(prompt: Prompt) -> bool:
    """Whether a new line would stand behind a tool's result that is a message of its own."""
    return prompt.units[-1].role == "tool"


def head_role(prompt: Prompt) -> str:
    """The role of the system prompt, which is that of a line with its authority."""
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
    """Whether a line may hide what stands before it. An operator's `user` says that a line arrives, and no more than that."""
    return form is Form.USER or (form is Form.SYSTEM and role is LineRole.AUTO)


def _rendering(form: Form, prompt: Prompt, verdicts: Mapping[str, str]) -> str:
    """What a rendering showed of a form; empty where none did, or the request brings its own template."""
    if form is Form.INLINE:
        return ""
    return _rendered(about_rendering(_role(form, prompt), tools=_has_tools(prompt)), prompt, verdicts)


def _rendered(what: str, prompt: Prompt, verdicts: Mapping[str, str]) -> str:
    return "" if prompt.body.data.get("chat_template") else verdicts.get(what, "")


def _role(form: Form, prompt: Prompt) -> str:
    """The role of the message that a line is."""
    return head_role(prompt) if form is Form.SYSTEM else "user"


def _has_tools(prompt: Prompt) -> bool:
    return bool(prompt.body.data.get("tools")) or any(unit.role == "tool" for unit in prompt.turns)
