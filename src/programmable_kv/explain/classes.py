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
    "Write it once, at the start of the conversation, or append the new value to the newest message and leave it there: text "
    "that changes belongs at the end."
)

CLASSES = (
    CauseClass(
        "model changed",
        "The request goes to another model. Each model has its own cache.",
        "Keep a conversation on one model; give side tasks to the other model in a separate conversation.",
        lambda case: case.earlier.model != case.later.model and case.same_conversation,
        key="model",
    ),
    CauseClass(
        "cache salt changed",
        "`cache_salt` separates the caches of requests that are otherwise equal.",
        "Use one salt per tenant, not one per request.",
        lambda case: case.earlier.salt != case.later.salt and case.same_conversation,
        key="cache_salt",
    ),
    CauseClass(
        "appended",
        "The request begins with an entire earlier request.",
        "",
        lambda case: case.difference.only_appended,
        lost=False,
    ),
    CauseClass(
        "repeated",
        "An earlier request begins with this entire request.",
        "",
        lambda case: case.difference.only_shorter,
        lost=False,
    ),
    CauseClass(
        "stored conversation",
        "The server stores the earlier conversation (`previous_response_id`), so there is no text to compare.",
        "",
        lambda case: any(piece is not None and piece.path == STORED for piece in (case.before, case.after)),
        lost=False,
    ),
    CauseClass(
        "new conversation",
        "A new conversation begins, or another agent sends the request: only the shared prefix is cached.",
        "",
        recognise.new_conversation,
        lost=False,
    ),
    CauseClass(
        "unknown (hashes only)",
        "The log contains hashes of blocks and no text: it shows where the prefix breaks, not why.",
        "Log the requests themselves to see the cause.",
        lambda case: Kind.BLOCK in case.kinds,
    ),
    CauseClass(
        "tools reordered",
        "The same tools are listed in a different order.",
        "Sort the tools by name before every request; a set, or servers that answer in any order, can change their order.",
        recognise.tools_reordered,
    ),
    CauseClass(
        "rolling cache_control",
        "A `cache_control` marker turned the content into a list, or was removed.",
        "Write the content as a list in every request, with or without a marker.",
        recognise.marker_moved,
    ),
    CauseClass(
        "serialisation flip",
        "The same content is written in another form: string or list, order of keys, spaces.",
        "Send the same bytes again instead of serialising the content again. Some servers render both forms alike, others do "
        "not; `--model` shows it for one chat template.",
        recognise.serialisation_flip,
    ),
    CauseClass(
        "stripped thinking",
        "Reasoning in the history of an earlier request was removed, or an empty reasoning block was added.",
        "Send answers back unchanged, with their reasoning, or leave reasoning out from the first turn on. If the chat "
        "template drops it, look for its switch (`preserve_thinking`, `clear_thinking`), or accept the loss of one turn.",
        recognise.thinking_changed,
    ),
    CauseClass(
        "client header",
        "The client writes a billing header with a new checksum as the first block of every request.",
        "Remove that block before it reaches the engine, or use an engine that strips it (vLLM does: vllm-project/vllm#36829).",
        recognise.billing_header,
    ),
    CauseClass(
        "clock",
        "A date or a time changed.",
        _FREEZE + " A date without a time breaks the prefix once a day.",
        recognise.volatile("clock"),
    ),
    CauseClass(
        "id",
        "An id changes with every request.",
        "Leave it out, or create it once per conversation.",
        recognise.volatile("id"),
    ),
    CauseClass("git status", "The state of a git repository changed.", _FREEZE, recognise.git_status),
    CauseClass(
        "file list",
        "A list of files or directories changed.",
        _FREEZE + " Or let a tool list the files when they are needed.",
        recognise.file_list,
    ),
    CauseClass(
        "moved reminder",
        "A reminder is moved to the end in every request.",
        "Leave the old one in place and append a new one only when it says something new.",
        recognise.moved,
    ),
    CauseClass("counter", "A number changed: tokens left, a turn, a budget.", _FREEZE, recognise.volatile("counter")),
    CauseClass(
        "environment block", "The directory, shell or machine of the session changed.", _FREEZE, recognise.environment
    ),
    CauseClass(
        "state block",
        "A block of state changed: memory, todos, a session's data.",
        _FREEZE + " A block that only grows may stay if it grows at its end and comes last.",
        recognise.state,
    ),
    CauseClass(
        "tools changed",
        "A tool was added, removed or changed.",
        "Send every tool in every request, in the same order; forbid unwanted ones with `tool_choice` or in a message.",
        recognise.tools_changed,
    ),
    CauseClass(
        "history trimmed",
        "Messages were dropped from the history.",
        "Drop many at once, and rarely, instead of one each turn.",
        recognise.trimmed,
    ),
    CauseClass(
        "message inserted",
        "A message was inserted before messages that were already sent.",
        "Append it at the end of the conversation.",
        recognise.inserted,
    ),
    CauseClass(
        "history compacted",
        "Earlier messages were replaced with fewer.",
        "Compact rarely, and keep the tools and the system prompt unchanged, byte for byte.",
        recognise.compacted,
    ),
    CauseClass(
        "tool result changed",
        "A tool result was shortened, cleared or rewritten.",
        "Shorten a result before it is first sent; clear old results many at once, and rarely.",
        recognise.tool_result,
    ),
    CauseClass(
        "system prompt changed",
        "The text of the system prompt changed.",
        "Keep it unchanged, byte for byte; put new information in a message.",
        lambda case: Kind.SYSTEM in case.kinds,
    ),
    CauseClass(
        "varying part first",
        "Conversations begin with a part that varies, followed by the same long text.",
        "Put the constant text first, in the system prompt if it fits there, and the part that varies last.",
        recognise.varying_first,
    ),
    CauseClass(
        "rewritten message",
        "The text of an earlier message changed.",
        "Send earlier messages unchanged; make corrections in a new message.",
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
