"""The classes of causes, as a table: how each is recognised, and what to do about it. The first row that fits is the cause.

A new class is a new row here and a row in `tests/explain/test_classes.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from programmable_kv.explain.case import Case, alike, without_numbers
from programmable_kv.explain.pieces import Kind, Piece
from programmable_kv.explain.protocols import STORED
from programmable_kv.explain.volatile import CLOCK_CUES, COUNTER_CUES

_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_BILLING = "x-anthropic-billing-header"
_GIT = re.compile(r"^\s?(?:[MADRCU?!]{1,2}|[MADRCU] [MADRCU]?) \S|^[0-9a-f]{7,12} \S|^\(clean\)$|^(?:Current|Main) branch", re.MULTILINE)
_PATH = re.compile(r"^\s*(?:[├└│─\s]+\S+|[-*] )?[\w./@-]*(?:/[\w.@-]+|\w\.\w{1,5})/?\s*$")
_ENVIRONMENT = re.compile(r"(?i)\b(?:cwd|working directory|workspace|shell|platform|os version|timezone|hostname)\b|environment")
_STATE = re.compile(r"(?i)memor|todo|state|session|sender|runtime|context|profile|notes|plan|status|summary|scratch|order|cart|user")
_KEY_BEFORE = re.compile(r"[\w-]\"?\s*[:=]\s*[\"']?$|<[\w-]+>$|\[$")


@dataclass(frozen=True, slots=True)
class CauseClass:
    """A class of causes."""

    name: str
    what: str
    """what happened, in one sentence"""
    fix: str
    """what to do; empty where nothing is wrong"""
    recognise: Callable[[Case], bool]
    lost: bool = True
    """False where a prefix cache loses nothing by it"""
    key: str = ""
    """the key of the request that is at fault, where it is none of its pieces"""


def classify(case: Case) -> CauseClass:
    """The first class of the table that fits the change."""
    return next(row for row in CLASSES if row.recognise(case))


def classify_behind(case: Case) -> CauseClass:
    """The class of a change behind the first one: only what the two texts themselves say."""
    return next(row for row in CLASSES if row in _OF_TEXT and row.recognise(case))


# -- recognisers -----------------------------------------------------------------------------------------------------------


def _tools(case: Case) -> tuple[list[str], list[str]]:
    sides = (case.earlier, case.later)
    one, other = ([piece.text for piece in side.pieces if piece.kind is Kind.TOOL] for side in sides)
    return one, other


def _tools_reordered(case: Case) -> bool:
    one, other = _tools(case)
    return Kind.TOOL in case.kinds and sorted(one) == sorted(other)


def _tools_changed(case: Case) -> bool:
    return Kind.TOOL in case.kinds


def _tools_flipped(case: Case) -> bool:
    one, other = _tools(case)
    return Kind.TOOL in case.kinds and sorted(map(_canonical, one)) == sorted(map(_canonical, other))


def _marker_moved(case: Case) -> bool:
    before, after = case.before, case.after
    if before is None or after is None or before.text != after.text or before.form == after.form:
        return False
    return before.marked or after.marked


def _flipped(case: Case) -> bool:
    if _tools_flipped(case):
        return True
    if not case.same_kind or not case.shown:
        return False
    one, other = case.texts
    return one == other or "".join(one.split()) == "".join(other.split()) or _canonical(one) == _canonical(other)


def _canonical(text: str) -> Any:
    """JSON without regard to the order of keys and to spaces, also as the arguments of a call; other text as it is."""
    name, bracket, rest = text.partition("(")
    arguments, _, identity = rest.rpartition(")")
    for head, body in (("", text), (f"{name}{bracket}{identity}", arguments)):
        if body.lstrip().startswith(("{", "[")):
            try:
                return head + json.dumps(json.loads(body), sort_keys=True)
            except ValueError:
                continue
    return text


def _thinking(case: Case) -> bool:
    thoughts = {Kind.THINKING, Kind.OPAQUE}
    if case.both and len(case.kinds) == 2 and case.kinds & thoughts:
        return True
    if case.same_kind and case.kinds <= thoughts:
        return case.kinds == {Kind.OPAQUE} or not case.following_after
    one, other = case.texts
    return case.same_kind and one != other and _THOUGHT.sub("", one) == _THOUGHT.sub("", other)


def _billing(case: Case) -> bool:
    return case.shown and any(_BILLING in line for line in case.lines)


def _value(name: str) -> Callable[[Case], bool]:
    """A clock, id or counter. In a conversation, where people write dates and numbers too, something must announce it."""

    def recognise(case: Case) -> bool:
        value = case.value
        if value is None or value.name != name:
            return False
        if case.in_head:
            return True
        text = case.texts[1]
        line = case.lines[1]
        if name == "clock":
            return bool(CLOCK_CUES.search(line) or CLOCK_CUES.search(_label(case)))
        around = text[max(0, value.start - 40) : value.stop_after + 40]
        if name == "counter":
            return bool(COUNTER_CUES.search(around)) and case.kinds != {Kind.RESULT}
        return case.kinds <= {Kind.CALL, Kind.RESULT} or bool(_KEY_BEFORE.search(text[: value.start]))

    return recognise


def _git(case: Case) -> bool:
    head = case.texts[1][: case.change.offset]
    return case.same_kind and "git" in head[-4000:].lower() and any(_GIT.search(line) for line in case.lines)


def _files(case: Case) -> bool:
    named = re.search(r"(?i)files?\b|tree|director(?:y|ies)", _label(case))
    return case.same_kind and case.shown and any(_PATH.match(line) or (named and line) for line in case.lines)


def _environment(case: Case) -> bool:
    return case.same_kind and _announced(case) and any(_ENVIRONMENT.search(text) for text in (*case.lines, _label(case)))


def _state(case: Case) -> bool:
    return case.same_kind and _announced(case) and bool(_STATE.search(_label(case)) or _STATE.search(_key(case.lines[1])))


def _announced(case: Case) -> bool:
    """In the head anything may be a client's block; in a conversation a block stands in a tag."""
    return case.shown and (case.in_head or any(f"<{label}" in case.texts[1] for label in case.labels))


def _label(case: Case) -> str:
    return " ".join(case.labels)


def _key(line: str) -> str:
    name, colon, _ = line.partition(":")
    return name if colon and len(name) <= 40 else ""


def _moved(case: Case) -> bool:
    before, after = case.before, case.after
    if before is None or after is None or case.in_head or not case.shown:
        return False
    later = case.following_after
    last = not case.following_before
    if any(piece.key == before.key for piece in later):
        return last or after.key == case.following_before[0].key
    gone = before.text[case.change.offset :] if before.text.startswith(after.text) else ""
    if not gone.strip():
        return last and any(_same_but_numbers(piece, before) for piece in later)
    tail = without_numbers(gone.strip())
    return any(tail in without_numbers(piece.text) for piece in later)


def _same_but_numbers(one: Piece, other: Piece) -> bool:
    return one.role == other.role and "<" in other.text and without_numbers(one.text) == without_numbers(other.text)


def _trimmed(case: Case) -> bool:
    after = case.after
    return after is not None and not case.in_head and any(piece.key == after.key for piece in case.following_before)


def _inserted(case: Case) -> bool:
    before = case.before
    return before is not None and not case.in_head and any(piece.key == before.key for piece in case.following_after)


def _compacted(case: Case) -> bool:
    if case.in_head or not case.both:
        return False
    kept = {piece.key for piece in case.following_before} & {piece.key for piece in case.following_after}
    return not kept and not alike(*case.texts) and 2 * len(case.following_after) < len(case.following_before)


def _result(case: Case) -> bool:
    return case.kinds == {Kind.RESULT}


_FREEZE = "Write it once, when the conversation begins, or put it into the newest message: text that changes belongs at the end."

CLASSES = (
    CauseClass(
        "model changed", "Another model was asked. Caches are kept for each model.",
        "Keep a conversation on one model; give side tasks to the other model in a conversation of their own.",
        lambda case: case.earlier.model != case.later.model, key="model",
    ),
    CauseClass(
        "cache salt changed", "`cache_salt` parts the caches of requests that are otherwise equal.",
        "Use one salt for each tenant, not one for each request.",
        lambda case: case.earlier.salt != case.later.salt, key="cache_salt",
    ),
    CauseClass(
        "appended", "The request begins with all of an earlier one.", "", lambda case: case.difference.only_appended, lost=False,
    ),
    CauseClass(
        "repeated", "An earlier request begins with all of this one.", "", lambda case: case.difference.only_shorter, lost=False,
    ),
    CauseClass(
        "stored conversation", "The server holds what stands before the input (`previous_response_id`): nothing here to compare.",
        "", lambda case: any(piece is not None and piece.path == STORED for piece in (case.before, case.after)), lost=False,
    ),
    CauseClass(
        "new conversation", "A conversation begins, or another agent speaks: what it shares with earlier ones is found, no more.",
        "", lambda case: _new(case), lost=False,
    ),
    CauseClass(
        "unknown (hashes only)", "The log holds hashes of blocks and no text: it says where the prefix breaks, not why.",
        "Log the requests themselves to see the cause.", lambda case: Kind.BLOCK in case.kinds,
    ),
    CauseClass(
        "tools reordered", "The same tools stand in another order.",
        "Sort the tools by name before every request; do not build the list from a set or from servers that answer in any order.",
        _tools_reordered,
    ),
    CauseClass(
        "rolling cache_control", "A `cache_control` marker made the content a list, or was taken away again.",
        "Write the content as a list in every request, with and without a marker.", _marker_moved,
    ),
    CauseClass(
        "serialisation flip", "The same content in another form: string or list, order of keys, spaces.",
        "Keep the bytes that were sent and send them again; do not parse and write them anew. Whether a server renders both forms "
        "alike differs: `--model` shows it for one chat template.",
        _flipped,
    ),
    CauseClass(
        "stripped thinking", "Reasoning that an earlier request had in its history is left out, or an empty one is put in.",
        "Send the history as it was answered, or leave reasoning out from the first turn on. Where a chat template drops it, "
        "look for its switch (`preserve_thinking`, `clear_thinking`), or accept the loss of one turn.",
        _thinking,
    ),
    CauseClass(
        "client header", "The client writes a billing header with a new checksum as the first block of every request.",
        "Remove that block in front of the engine, or use an engine that strips it (vLLM does: vllm-project/vllm#36829).", _billing,
    ),
    CauseClass("clock", "A date or a time.", _FREEZE + " A date without a time breaks the prefix once a day.", _value("clock")),
    CauseClass("id", "An id that is made anew.", "Leave it out, or make it once for each conversation.", _value("id")),
    CauseClass("git status", "The state of a git repository.", _FREEZE, _git),
    CauseClass("file list", "A list of files or directories.", _FREEZE + " Or let a tool list files when they are needed.", _files),
    CauseClass("moved reminder", "A reminder is taken from where it stood and put at the end again.",
        "Leave the old one where it is and append a new one only when it says something new.", _moved,
    ),
    CauseClass("counter", "A number that changes: tokens left, a turn, a budget.", _FREEZE, _value("counter")),
    CauseClass("environment block", "The directory, shell or machine of the session.", _FREEZE, _environment),
    CauseClass("state block", "A block of state: memory, todos, a session's data.",
        _FREEZE + " A block that only grows may stay if it grows at its end and stands last.", _state,
    ),
    CauseClass("tools changed", "A tool was added, removed or changed.",
        "Send every tool in every request, in one order; forbid the ones not wanted now with `tool_choice` or in a message.",
        _tools_changed,
    ),
    CauseClass("history trimmed", "Messages were dropped from the history.",
        "Drop many at once and seldom, instead of one each turn.", _trimmed,
    ),
    CauseClass("message inserted", "A message was put in before others that were sent already.",
        "Append it at the end of the conversation.", _inserted,
    ),
    CauseClass("history compacted", "Earlier messages were replaced with fewer.",
        "Compact seldom, and keep tools and system prompt byte for byte.", _compacted,
    ),
    CauseClass("tool result changed", "A tool's result was shortened, cleared or written again.",
        "Shorten a result before it is sent for the first time; clear old ones many at once and seldom.", _result,
    ),
    CauseClass("system prompt changed", "The system prompt has other text.",
        "Keep it byte for byte; say what is new in a message.", lambda case: Kind.SYSTEM in case.kinds,
    ),
    CauseClass("rewritten message", "A message that was sent already has other text.",
        "Send it again as it was; correct it with a new message.", lambda case: True,
    ),
)  # fmt: skip
"""every class, in the order in which they are tried"""

_REQUEST_LEVEL = (
    "model changed", "cache salt changed", "appended", "repeated", "stored conversation", "new conversation",
    "tools reordered", "history trimmed", "message inserted", "history compacted", "moved reminder",
)  # fmt: skip
_OF_TEXT = tuple(row for row in CLASSES if row.name not in _REQUEST_LEVEL)


def _new(case: Case) -> bool:
    if Kind.BLOCK in case.kinds:
        return case.difference.index == 0
    if case.earlier.session and case.earlier.session == case.later.session and not case.in_head:
        return False
    return case.other_conversation and not _tools_reordered(case) and not _tools_flipped(case)
