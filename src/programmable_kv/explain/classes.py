"""The table of causes: how each class is recognised, and how to fix it. The first row that matches gives the cause.

To add a class, add a row here and one in `tests/explain/test_classes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from programmable_kv.explain import recognise
from programmable_kv.explain.case import Case
from programmable_kv.explain.pieces import Kind
from programmable_kv.explain.protocols import STORED


@dataclass(frozen=True, slots=True)
class CauseClass:
    """A class of causes."""

    name: str
    what: str
    """What happened, in one sentence."""
    fix: str
    """How to fix it; empty if nothing is wrong."""
    recognise: Callable[[Case], bool]
    lost: bool = True
    """Whether a prefix cache loses anything."""
    key: str = ""
    """The key of the request body that is at fault, if the cause is not in a piece."""


def classify(case: Case) -> CauseClass:
    """The first class of the table that matches the change."""
    return next(row for row in CLASSES if row.recognise(case))


def classify_behind(case: Case) -> CauseClass:
    """The class of a change behind the first one, among the classes that the two texts alone decide."""
    return next(row for row in CLASSES if row in _OF_TEXT and row.recognise(case))


_FREEZE = (
    "Write it once, when the conversation begins, or append what is new to the newest message and leave it there: text that "
    "changes belongs at the end."
)

CLASSES = (
    CauseClass(
        "model changed",
        "Another model was asked. Caches are kept for each model.",
        "Keep a conversation on one model; give side tasks to the other model in a conversation of their own.",
        lambda case: case.earlier.model != case.later.model and case.same_conversation,
        key="model",
    ),
    CauseClass(
        "cache salt changed",
        "`cache_salt` parts the caches of requests that are otherwise equal.",
        "Use one salt for each tenant, not one for each request.",
        lambda case: case.earlier.salt != case.later.salt and case.same_conversation,
        key="cache_salt",
    ),
    CauseClass(
        "appended",
        "The request begins with all of an earlier one.",
        "",
        lambda case: case.difference.only_appended,
        lost=False,
    ),
    CauseClass(
        "repeated",
        "An earlier request begins with all of this one.",
        "",
        lambda case: case.difference.only_shorter,
        lost=False,
    ),
    CauseClass(
        "stored conversation",
        "The server holds what stands before the input (`previous_response_id`): nothing here to compare.",
        "",
        lambda case: any(piece is not None and piece.path == STORED for piece in (case.before, case.after)),
        lost=False,
    ),
    CauseClass(
        "new conversation",
        "A conversation begins, or another agent speaks: what it shares with earlier ones is found, no more.",
        "",
        recognise.new_conversation,
        lost=False,
    ),
    CauseClass(
        "unknown (hashes only)",
        "The log holds hashes of blocks and no text: it says where the prefix breaks, not why.",
        "Log the requests themselves to see the cause.",
        lambda case: Kind.BLOCK in case.kinds,
    ),
    CauseClass(
        "tools reordered",
        "The same tools stand in another order.",
        "Sort the tools by name before every request; a set, or servers that answer in any order, give another list each time.",
        recognise.tools_reordered,
    ),
    CauseClass(
        "rolling cache_control",
        "A `cache_control` marker made the content a list, or was taken away again.",
        "Write the content as a list in every request, with and without a marker.",
        recognise.marker_moved,
    ),
    CauseClass(
        "serialisation flip",
        "The same content in another form: string or list, order of keys, spaces.",
        "Send the same bytes again instead of writing the content anew. Whether a server renders both forms alike differs; "
        "`--model` shows it for one chat template.",
        recognise.serialisation_flip,
    ),
    CauseClass(
        "stripped thinking",
        "Reasoning that an earlier request had in its history is left out, or an empty one is put in.",
        "Send the history as it was answered, or leave reasoning out from the first turn on. Where a chat template drops it, "
        "look for its switch (`preserve_thinking`, `clear_thinking`), or accept the loss of one turn.",
        recognise.thinking_changed,
    ),
    CauseClass(
        "client header",
        "The client writes a billing header with a new checksum as the first block of every request.",
        "Remove that block in front of the engine, or use an engine that strips it (vLLM does: vllm-project/vllm#36829).",
        recognise.billing_header,
    ),
    CauseClass(
        "clock",
        "A date or a time.",
        _FREEZE + " A date without a time breaks the prefix once a day.",
        recognise.volatile("clock"),
    ),
    CauseClass(
        "id",
        "An id that is made anew.",
        "Leave it out, or make it once for each conversation.",
        recognise.volatile("id"),
    ),
    CauseClass("git status", "The state of a git repository.", _FREEZE, recognise.git_status),
    CauseClass(
        "file list",
        "A list of files or directories.",
        _FREEZE + " Or let a tool list files when they are needed.",
        recognise.file_list,
    ),
    CauseClass(
        "moved reminder",
        "A reminder is taken from where it stood and put at the end again.",
        "Leave the old one where it is and append a new one only when it says something new.",
        recognise.moved,
    ),
    CauseClass(
        "counter", "A number that changes: tokens left, a turn, a budget.", _FREEZE, recognise.volatile("counter")
    ),
    CauseClass("environment block", "The directory, shell or machine of the session.", _FREEZE, recognise.environment),
    CauseClass(
        "state block",
        "A block of state: memory, todos, a session's data.",
        _FREEZE + " A block that only grows may stay if it grows at its end and stands last.",
        recognise.state,
    ),
    CauseClass(
        "tools changed",
        "A tool was added, removed or changed.",
        "Send every tool in every request, in one order; forbid the ones not wanted now with `tool_choice` or in a message.",
        recognise.tools_changed,
    ),
    CauseClass(
        "history trimmed",
        "Messages were dropped from the history.",
        "Drop many at once and seldom, instead of one each turn.",
        recognise.trimmed,
    ),
    CauseClass(
        "message inserted",
        "A message was put in before others that were sent already.",
        "Append it at the end of the conversation.",
        recognise.inserted,
    ),
    CauseClass(
        "history compacted",
        "Earlier messages were replaced with fewer.",
        "Compact seldom, and keep tools and system prompt byte for byte.",
        recognise.compacted,
    ),
    CauseClass(
        "tool result changed",
        "A tool's result was shortened, cleared or written again.",
        "Shorten a result before it is sent for the first time; clear old ones many at once and seldom.",
        recognise.tool_result,
    ),
    CauseClass(
        "system prompt changed",
        "The system prompt has other text.",
        "Keep it byte for byte; say what is new in a message.",
        lambda case: Kind.SYSTEM in case.kinds,
    ),
    CauseClass(
        "varying part first",
        "Conversations begin with the same long text behind a part that varies.",
        "Put what is always the same first, into the system prompt if it fits there, and what varies last.",
        recognise.varying_first,
    ),
    CauseClass(
        "rewritten message",
        "A message that was sent already has other text.",
        "Send it again as it was; correct it with a new message.",
        lambda case: True,
    ),
)
"""All classes, in the order in which they are tried."""

_REQUEST_LEVEL = (
    "model changed",
    "cache salt changed",
    "appended",
    "repeated",
    "stored conversation",
    "new conversation",
    "tools reordered",
    "history trimmed",
    "message inserted",
    "history compacted",
    "moved reminder",
)
_OF_TEXT = tuple(row for row in CLASSES if row.name not in _REQUEST_LEVEL)
