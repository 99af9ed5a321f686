"""Tools: checks whether the model's chat template supports them, and finds the calls in the model's text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from programmable_kv.models.load import Model
from programmable_kv.prompt.parts import Message, Text
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.serve.refusal import Refusal, RefusedError

CALL = "<tool_call>"
"""The beginning of a call in the form that this server reads. Qwen, Hermes and other models write it."""
_CALLS = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_PROBE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "pkv_probe", "arguments": {"pkv_key": "pkv value"}},
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call by the model."""

    name: str
    arguments: str
    """The arguments as the text of a JSON object."""
    identity: str = ""


def check_tools(model: Model, tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that the chat template shows the model every tool, and writes calls in the form that this server reads.

    The check renders the template with the tools under random names, and with a call.

    Raises:
        RefusedError: the template leaves tools out, or writes calls in another form.
        TemplateError: the template raises an error for tools.
    """
    names = [f"pkv_tool_{number}_{secrets.token_hex(4)}" for number in range(len(tools))]
    renamed = tuple(_renamed(tool, name) for tool, name in zip(tools, names, strict=True))
    template = ChatTemplate(model.tokenizer, renamed)
    shown = template.filled([Message("user", Text("OK"))], {}, asks=True)
    if not all(name in shown for name in names):
        raise _not_supported("the chat template of this model ignores tools, so the model would never see them")
    called = Message("assistant", Text(""), {"tool_calls": [_PROBE]})
    text = template.filled([Message("user", Text("OK")), called], {})
    _, calls = split(text[text.rfind(CALL) :] if CALL in text else "")
    function = _PROBE["function"]
    if [(each.name, json.loads(each.arguments)) for each in calls] != [(function["name"], function["arguments"])]:
        raise _not_supported(
            "this model writes tool calls in a form that this server cannot read (it reads <tool_call> and JSON)"
        )


def split(text: str) -> tuple[str, list[ToolCall]]:
    """Split the model's output into text and tool calls. A call that cannot be read stays in the text."""
    calls: list[ToolCall] = []

    def read(match: re.Match[str]) -> str:
        call = _call(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    said = _CALLS.sub(read, text)
    return (said.rstrip() if calls else said), calls


def _call(text: str) -> ToolCall | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    if not isinstance(arguments, Mapping):
        return None
    return ToolCall(found["name"], json.dumps(arguments), f"call_{secrets.token_hex(12)}")


def _renamed(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def _not_supported(why: str) -> RefusedError:
    return RefusedError(Refusal(400, "tools_not_supported", f"{why}. Leave the tools out, or serve another model"))
