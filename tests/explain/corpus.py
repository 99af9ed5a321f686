"""The replay corpus: what real clients put early into a prompt, in each client's protocol, with invented values.

Every shape is a short log of two or three requests as the client sends them, and names where the shape was reported.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

RULES = "You are a coding agent.\n" + "".join(
    f"- Rule {n}: keep the change small and say what was not tested.\n" for n in range(30)
)
ASKED, ANSWERED, ASKED_NEXT = (
    "Fix the failing test.",
    "It is fixed: the bound was off by one.",
    "Now add a changelog line.",
)
LONG = "def test_bound():\n    assert bound(3) == 3\n" * 40


@dataclass(frozen=True)
class Shape:
    """A log, and what must be found for its last request."""

    name: str
    number: int
    """its number in the list of shapes; 0 for shapes that are not in the list"""
    reported: str
    log: tuple[Body, ...]
    cause: str
    place: str
    behind: str = ""
    """a class that must be found after the first difference"""


def chat(system: str, *turns: Any, tools: list[Body] | None = None, **other: Any) -> Body:
    """A Chat Completions body: a system message, then alternating turns of user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    body: Body = {"model": "some-model", "messages": [{"role": "system", "content": system}, *messages], **other}
    return {**body, "tools": tools} if tools else body


def claude(system: list[str], *turns: Any, tools: list[Body] | None = None, **other: Any) -> Body:
    """A Messages body: blocks of the system prompt, then turns, each a text or a list of blocks."""
    roles = ("user", "assistant")
    body: Body = {
        "model": "claude-sonnet-5-5",
        "max_tokens": 1000,
        "system": [{"type": "text", "text": text} for text in system],
        "messages": [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)],
        **other,
    }
    return {**body, "tools": tools} if tools else body


def codex(*items: Body, instructions: str = RULES, tools: list[Body] | None = None, **other: Any) -> Body:
    """A Responses body."""
    body: Body = {"model": "gpt-6-sol", "instructions": instructions, "input": list(items), **other}
    return {**body, "tools": tools} if tools else body


def said(role: str, text: str) -> Body:
    """A Responses message."""
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def tool(name: str) -> Body:
    """A tool of Chat Completions."""
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    return {"type": "function", "function": {"name": name, "description": f"The tool {name}.", "parameters": schema}}


def dated(day: str) -> Body:
    """A tool whose description changes every day."""
    return {"type": "function", "function": {"name": "calendar", "description": f"Today is {day}.", "parameters": {}}}


def twice(system: str, changed: str) -> tuple[Body, ...]:
    """A conversation whose system prompt changes between its two turns."""
    return chat(system + RULES, ASKED), chat(changed + RULES, ASKED, ANSWERED, ASKED_NEXT)


def block(text: str) -> Body:
    """A block of text."""
    return {"type": "text", "text": text}


def marked(text: str) -> list[Body]:
    """Content that asks to be cached."""
    return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]


def _billing(checksum: str) -> str:
    return f"x-anthropic-billing-header: cc_version=2.1.9; cc_entrypoint=cli; cch={checksum};"


def _left(tokens: int) -> str:
    return f"<total_tokens>{tokens} tokens left</total_tokens>"


def _status(*changed: str) -> str:
    lines = "\n".join(changed) or "(clean)"
    head = "gitStatus: This is the git status at the start.\nCurrent branch: main\n\nStatus:"
    return f"{head}\n{lines}\n\nRecent commits:\nabc1234 Add a bound\n"


def _environment(day: str) -> str:
    return (
        "<environment_context>\n  <cwd>/srv/app</cwd>\n  <shell>bash</shell>\n"
        f"  <current_date>{day}</current_date>\n  <timezone>Europe/Vienna</timezone>\n</environment_context>"
    )


def _files(*more: str) -> str:
    names = [f"src/part_{n:03}.py" for n in range(200)]
    return "<files>\n" + "\n".join([*names[:100], *more, *names[100:]]) + "\n</files>\n"


_TOOLS = [tool(name) for name in ("read", "write", "search", "run")]
_THOUGHT = {"type": "thinking", "thinking": "The bound is inclusive here.", "signature": "c2lnbmF0dXJlLTE="}
_CALL = {"type": "tool_use", "id": "toolu_01a", "name": "read", "input": {"path": "bound.py"}}
_RESULT = {"type": "tool_result", "tool_use_id": "toolu_01a", "content": LONG}
_REMINDER = "<system-reminder>\nThe todo list is empty. Do not mention this to the user.\n</system-reminder>"

SHAPES = (
    Shape(
        "billing header", 1, "anthropics/claude-code#68900",
        (claude([_billing("a1b2c"), RULES], ASKED), claude([_billing("09fe3"), RULES], ASKED, ANSWERED, ASKED_NEXT)),
        "client header", "system prompt",
    ),
    Shape(
        "git status", 2, "anthropics/claude-code#47107",
        (claude([RULES, _status()], ASKED), claude([RULES, _status(" M src/bound.py")], ASKED, ANSWERED, ASKED_NEXT)),
        "git status", "system prompt",
    ),
    Shape(
        "tokens left", 3, "ollama/ollama#18431",
        (
            claude([RULES], f"{ASKED}\n{_left(183204)}"),
            claude([RULES], f"{ASKED}\n{_left(181977)}", ANSWERED, ASKED_NEXT),
        ),
        "counter", "message 1 (user)",
    ),
    Shape(
        "tokens left, moved to the newest message", 3, "ollama/ollama#18431",
        (
            claude([RULES], f"{ASKED}\n{_left(183204)}", [_CALL], [_RESULT]),
            claude([RULES], ASKED, [_CALL], [_RESULT], ANSWERED, f"{ASKED_NEXT}\n{_left(181977)}"),
        ),
        "moved reminder", "message 1 (user)",
    ),
    Shape(
        "the date has changed", 4, "anthropics/claude-code#77059",
        (
            claude([RULES], [block("The date has changed. Today's date is now 2026-06-09."), *marked(ASKED)]),
            claude(
                [RULES], [block("The date has changed. Today's date is now 2026-06-10."), *marked(ASKED)],
                ANSWERED, marked(ASKED_NEXT),
            ),
        ),
        "clock", "message 1 (user)",
    ),
    Shape(
        "environment context", 5, "openai/codex PR#12947",
        (
            codex(said("user", _environment("2026-06-09")), said("user", ASKED)),
            codex(said("user", _environment("2026-06-10")), said("user", ASKED), said("assistant", ANSWERED)),
        ),
        "clock", "message 1 (user)",
    ),
    Shape(
        "toDateString", 6, "opencode#32622",
        twice("Today's date: Tue Jun 09 2026\n", "Today's date: Wed Jun 10 2026\n"), "clock", "system prompt",
    ),
    Shape("list of files", 6, "opencode#5224", twice(_files(), _files("src/part_099_test.py")), "file list", "system prompt"),
    Shape(
        "moving reminder", 7, "opencode#23595",
        (
            claude([RULES], [block(ASKED), block(_REMINDER)], [_CALL], [_RESULT]),
            claude([RULES], [block(ASKED)], [_CALL], [_RESULT], ANSWERED,
                   [block(ASKED_NEXT), block(_REMINDER)]),
        ),
        "moved reminder", "message 2 (assistant, tool call)",
    ),
    Shape(
        "date and directory", 8, "oh-my-pi#7324",
        twice(
            "Today is 2026-06-09, and the current working directory is '/srv/app'.\n",
            "Today is 2026-06-10, and the current working directory is '/srv/app'.\n",
        ),
        "clock", "system prompt",
    ),
    Shape(
        "directory alone", 8, "oh-my-pi#7324",
        twice(
            "Today is 2026-06-09, and the current working directory is '/srv/app'.\n",
            "Today is 2026-06-09, and the current working directory is '/srv/web'.\n",
        ),
        "environment block", "system prompt",
    ),
    Shape(
        "long local time", 9, "pi_agent_rust#103",
        twice("Now: Tuesday, June 9, 2026, 03:04:20 PM +03:00\n", "Now: Tuesday, June 9, 2026, 03:06:01 PM +03:00\n"),
        "clock", "system prompt",
    ),
    Shape(
        "strftime with a zone", 10, "open-chat-studio#3625",
        twice("Tuesday, 09 June 2026 23:59:58 UTC\n", "Wednesday, 10 June 2026 00:00:07 UTC\n"), "clock", "system prompt",
    ),
    Shape(
        "current date and time", 11, "anything-llm#6398",
        twice("The current date and time is June 9, 2026 3:04 PM.\n", "The current date and time is June 9, 2026 3:05 PM.\n"),
        "clock", "system prompt",
    ),
    Shape(
        "isoformat with microseconds", 12, "private-gpt PR#2271",
        twice("Time: 2026-06-09T15:04:20.123456\n", "Time: 2026-06-09T15:04:31.000017\n"), "clock", "system prompt",
    ),
    Shape(
        "section of the current time", 13, "picoclaw PR#3321",
        twice("## Current Time\n2026-06-09 15:04 (Tuesday)\n\n## Runtime\nlinux amd64\n",
              "## Current Time\n2026-06-09 15:09 (Tuesday)\n\n## Runtime\nlinux amd64\n"),
        "clock", "system prompt",
    ),
    Shape(
        "section of the session", 13, "picoclaw PR#3321",
        twice("## Current Session\nChat: 7f3a9c21\n", "## Current Session\nChat: 0be14d77\n"),
        "id", "system prompt",
    ),
    Shape(
        "section of the sender", 13, "picoclaw PR#3321",
        twice("## Current Sender\nAnna (member)\n", "## Current Sender\nBoris (member)\n"), "state block", "system prompt",
    ),
    Shape(
        "memory context", 14, "open-webui#30239",
        twice("<memory_context>\n- likes tea\n</memory_context>\n", "<memory_context>\n- has cats\n</memory_context>\n"),
        "state block", "system prompt",
    ),
    Shape(
        "memory blocks", 14, "letta#3217",
        twice("<memory_blocks>\n<human>\nName: Anna.\n</human>\n</memory_blocks>\n",
              "<memory_blocks>\n<human>\nName: Anna. Prefers tea.\n</human>\n</memory_blocks>\n"),
        "state block", "system prompt",
    ),
    Shape(
        "file tree that gains a line", 14, "oh-my-openagent#8470",
        twice("Project tree:\n├── README.md\n└── src\n", "Project tree:\n├── README.md\n├── notes.md\n└── src\n"),
        "file list", "system prompt",
    ),
    Shape(
        "tools in another order", 15, "opencode#23571",
        (chat(RULES, ASKED, tools=_TOOLS), chat(RULES, ASKED, ANSWERED, ASKED_NEXT, tools=[*_TOOLS[2:], *_TOOLS[:2]])),
        "tools reordered", "tool list",
    ),
    Shape(
        "tools in another order, Responses", 15, "openai/codex PR#2611",
        (
            codex(said("user", ASKED), tools=_TOOLS),
            codex(said("user", ASKED), said("assistant", ANSWERED), said("user", ASKED_NEXT), tools=_TOOLS[::-1]),
        ),
        "tools reordered", "tool list",
    ),
    Shape(
        "empty thought in the history", 16, "QwenLM/Qwen3.8#48",
        (
            chat(RULES, ASKED, f"<think>\n\n</think>\n\n{ANSWERED}", ASKED_NEXT),
            chat(RULES, ASKED, ANSWERED, ASKED_NEXT, "Added.", "Thanks."),
        ),
        "stripped thinking", "message 2 (assistant)",
    ),
    Shape(
        "thinking left out", 16, "QwenLM/Qwen3.8#131",
        (
            claude([RULES], ASKED, [_THOUGHT, _CALL], [_RESULT]),
            claude([RULES], ASKED, [_CALL], [_RESULT], ANSWERED, ASKED_NEXT),
        ),
        "stripped thinking", "message 2 (assistant, tool call)",
    ),
    Shape(
        "rolling cache_control", 17, "sgl-project/sglang#36877",
        (
            chat(RULES, marked(ASKED)),
            chat(RULES, ASKED, ANSWERED, ASKED_NEXT),
        ),
        "rolling cache_control", "message 1 (user)",
    ),
    Shape(
        "list and string", 0, "mlx-vlm#2001",
        (
            chat(RULES, [block(ASKED + LONG)]),
            chat(RULES, ASKED + LONG, ANSWERED, ASKED_NEXT),
        ),
        "serialisation flip", "message 1 (user)",
    ),
    Shape(
        "order of keys in a tool", 0, "a client that writes JSON anew",
        (
            chat(RULES, ASKED, tools=_TOOLS),
            chat(RULES, ASKED, ANSWERED, ASKED_NEXT, tools=[dict(reversed(list(each.items()))) for each in _TOOLS]),
        ),
        "serialisation flip", "tool list",
    ),
    Shape(
        "another model", 0, "a client that routes by price",
        (chat(RULES, ASKED), {**chat(RULES, ASKED, ANSWERED, ASKED_NEXT), "model": "other-model"}),
        "model changed", "the whole request",
    ),
    Shape(
        "salt for each request", 0, "vLLM's cache_salt",
        (chat(RULES, ASKED, cache_salt="one"), chat(RULES, ASKED, ANSWERED, ASKED_NEXT, cache_salt="two")),
        "cache salt changed", "the whole request",
    ),
    Shape(
        "a tool is added", 0, "MCP servers that connect late",
        (chat(RULES, ASKED, tools=_TOOLS[:3]), chat(RULES, ASKED, ANSWERED, ASKED_NEXT, tools=_TOOLS)),
        "tools changed", "tool list",
    ),
    Shape(
        "a date in a tool's description", 0, "a tool that says what day it is",
        (
            chat(RULES, ASKED, tools=[*_TOOLS[:1], dated("2026-06-09"), *_TOOLS[1:]]),
            chat(RULES, ASKED, ANSWERED, ASKED_NEXT, tools=[*_TOOLS[:1], dated("2026-06-10"), *_TOOLS[1:]]),
        ),
        "clock", "tool list",
    ),
    Shape(
        "edited message", 0, "a user who edits",
        (
            chat(RULES, "Meet me at 10:30.", ANSWERED, ASKED_NEXT),
            chat(RULES, "Meet me at 11:45.", ANSWERED, ASKED_NEXT, "Done.", "Thanks."),
        ),
        "rewritten message", "message 1 (user)",
    ),
    Shape(
        "instructions behind what varies", 0, "a batch job",
        (chat("Sort it.", f"Ticket: my parcel is late.\n{RULES}"), chat("Sort it.", f"Ticket: refund me!\n{RULES}")),
        "varying part first", "message 1 (user)",
    ),
    Shape(
        "oldest messages dropped", 0, "a sliding window",
        (chat(RULES, ASKED, ANSWERED, ASKED_NEXT, "Added."), chat(RULES, ASKED_NEXT, "Added.", "Thanks.")),
        "history trimmed", "message 1 (user)",
    ),
    Shape(
        "old tool result cleared", 0, "context editing",
        (
            claude([RULES], ASKED, [_CALL], [_RESULT], ANSWERED, ASKED_NEXT),
            claude([RULES], ASKED, [_CALL], [{**_RESULT, "content": "[cleared]"}], ANSWERED, ASKED_NEXT, "Added.", "Thanks."),
        ),
        "tool result changed", "message 3 (user, tool result)",
    ),
    Shape(
        "system prompt deployed anew", 0, "a release",
        twice("You are helpful.\n", "You are brief and friendly.\n"), "system prompt changed", "system prompt",
    ),
    Shape(
        "a clock and a memory", 0, "two causes in one prompt",
        (
            claude(["Today is 2026-06-09.", RULES, "<memory>\n- likes tea\n</memory>"], ASKED),
            claude(["Today is 2026-06-10.", RULES, "<memory>\n- likes coffee\n</memory>"], ASKED, ANSWERED, ASKED_NEXT),
        ),
        "clock", "system prompt", behind="state block",
    ),
)  # fmt: skip

QUIET = (
    ("appended turn", (chat(RULES, ASKED), chat(RULES, ASKED, ANSWERED, ASKED_NEXT)), "appended"),
    ("code words that stay", (chat(RULES, "Call uuid4() at 10:30, 5 tokens left"),
                              chat(RULES, "Call uuid4() at 10:30, 5 tokens left", ANSWERED, ASKED_NEXT)), "appended"),
    ("the same again", (chat(RULES, ASKED), chat(RULES, ASKED)), "repeated"),
    ("a branch from an earlier turn", (chat(RULES, ASKED, ANSWERED, ASKED_NEXT), chat(RULES, ASKED)), "repeated"),
    ("another conversation", (chat(RULES, ASKED, ANSWERED), chat(RULES, "What is in the README?")), "new conversation"),
    ("another agent", (chat(RULES, ASKED), chat("You name conversations.", "Name this one.")), "new conversation"),
    ("a longer last message", (claude([RULES], ASKED), claude([RULES], f"{ASKED} And the other one.")), "appended"),
    ("markers that roll", (claude([RULES], marked(ASKED)), claude([RULES], ASKED, ANSWERED, marked(ASKED_NEXT))), "appended"),
    ("a stored conversation", (codex(said("user", ASKED), previous_response_id="resp_1"),
                               codex(said("user", ASKED_NEXT), previous_response_id="resp_2")), "stored conversation"),
)  # fmt: skip
"""logs in which no cached prefix is lost: name, log, and the class of the last request"""


def log_of(shape: Shape) -> list[Body]:
    """A copy of a shape's log that may be changed."""
    return copy.deepcopy(list(shape.log))
