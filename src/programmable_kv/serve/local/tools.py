"""Tools: whether the model's chat template takes them, and the calls in what the model says."""

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
"""how a call begins in the form that is read here. Qwen, Hermes and others write it"""
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
    """JSON"""
    identity: str = ""


def check_tools(model: Model, tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that the chat template shows the model every tool, and that calls in its form can be read.

    The template itself is asked: it is given tools with names that stand nowhere else, and a call.

    Raises:
        RefusedError: it leaves tools out, or writes calls in another form.
        TemplateError: it refuses tools.
    """
    names = [f"pkv_tool_{number}_{secrets.token_hex(4)}" for number in range(len(tools))]
    renamed = tuple(_renamed(tool, name) for tool, name in zip(tools, names, strict=True))
    template = ChatTemplate(model.tokenizer, renamed)
    shown = template.filled([Message("user", Text("OK"))], {}, asks=True)
    if not all(name in shown for name in names):
        raise _not_supported("the chat template of this model leaves tools out: it would never see them")
    called = Message("assistant", Text(""), {"tool_calls": [_PROBE]})
    text = template.filled([Message("user", Text("OK")), called], {})
    _, calls = split(text[text.rfind(CALL) :] if CALL in text else "")
    function = _PROBE["function"]
    if [(each.name, json.loads(each.arguments)) for each in calls] != [(function["name"], function["arguments"])]:
        raise _not_supported(
            "this model writes tool calls in a form that is not read here (read are <tool_call> and JSON)"
        )


def split(text: str) -> tuple[str, list[ToolCall]]:
    """What the model says, and the tools that it calls. A call that cannot be read stays text: nothing is lost."""
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
