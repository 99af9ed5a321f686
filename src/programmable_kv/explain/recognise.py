"""Recognisers for the classes of causes: one question about two differing pieces each. `classes.py` orders them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from programmable_kv.explain.case import Case, alike, without_numbers
from programmable_kv.explain.pieces import Kind, Piece
from programmable_kv.explain.volatile import CLOCK_CUES, COUNTER_CUES

_LONGEST_PATH = 300
_BILLING = "x-anthropic-billing-header"
_GIT = re.compile(
    r"^\s?(?:[MADRCU?!]{1,2}|[MADRCU] [MADRCU]?) \S|^[0-9a-f]{7,12} \S|^\(clean\)$|^(?:Current|Main) branch",
    re.MULTILINE,
)
_PATH = re.compile(r"^\s*(?:[├└│─\s]+\S+|[-*] )?[\w./@-]*(?:/[\w.@-]+|\w\.\w{1,5})/?\s*$")
_ENVIRONMENT = re.compile(
    r"(?i)\b(?:cwd|working directory|workspace|shell|platform|os version|timezone|hostname)\b|environment"
)
_STATE = re.compile(
    r"(?i)memor|todo|state|session|sender|runtime|context|profile|notes|plan|status|summary|scratch|order|cart|user"
)
_KEY_BEFORE = re.compile(r"[\w-]\"?\s*[:=]\s*[\"']?$|<[\w-]+>$|\[$")


def _tools(case: Case) -> tuple[list[str], list[str]]:
    sides = (case.earlier, case.later)
    one, other = ([piece.text for piece in side.pieces if piece.kind is Kind.TOOL] for side in sides)
    return one, other


def tools_reordered(case: Case) -> bool:
    one, other = _tools(case)
    return Kind.TOOL in case.kinds and sorted(one) == sorted(other)


def tools_changed(case: Case) -> bool:
    return Kind.TOOL in case.kinds


def _tools_flipped(case: Case) -> bool:
    one, other = _tools(case)
    return Kind.TOOL in case.kinds and sorted(map(_canonical, one)) == sorted(map(_canonical, other))


def marker_moved(case: Case) -> bool:
    before, after = case.before, case.after
    if before is None or after is None or before.text != after.text or before.form == after.form:
        return False
    return before.marked or after.marked


def serialisation_flip(case: Case) -> bool:
    if _tools_flipped(case):
        return True
    if not case.same_kind or not case.shown:
        return False
    one, other = case.texts
    return one == other or "".join(one.split()) == "".join(other.split()) or _canonical(one) == _canonical(other)


def _canonical(text: str) -> Any:
    """JSON, also as the arguments of a call, with sorted keys and uniform spaces; other text is returned unchanged."""
    name, bracket, rest = text.partition("(")
    arguments, _, identity = rest.rpartition(")")
    for head, body in (("", text), (f"{name}{bracket}{identity}", arguments)):
        if body.lstrip().startswith(("{", "[")):
            try:
                return head + json.dumps(json.loads(body), sort_keys=True)
            except (ValueError, RecursionError):
                continue
    return text


def thinking_changed(case: Case) -> bool:
    thoughts = {Kind.THINKING, Kind.OPAQUE}
    if case.both and len(case.kinds) == 2 and case.kinds & thoughts:
        return True
    if case.same_kind and case.kinds <= thoughts:
        return case.kinds == {Kind.OPAQUE} or not case.following_after
    one, other = case.texts
    return case.same_kind and one != other and without_thoughts(one) == without_thoughts(other)


def without_thoughts(text: str) -> str:
    """The text without everything from `<think>` to `</think>` and the white space after it."""
    kept = ""
    while True:
        before, opened, rest = text.partition("<think>")
        _, closed, behind = rest.partition("</think>")
        if not opened or not closed:
            return kept + text
        kept, text = kept + before, behind.lstrip()


def billing_header(case: Case) -> bool:
    return case.shown and any(_BILLING in line for line in case.lines)


def volatile(name: str) -> Callable[[Case], bool]:
    """A recogniser for a clock, id or counter.

    People write dates and numbers in conversations too, so there the text around the value must also point to one.
    """

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


def git_status(case: Case) -> bool:
    head = case.texts[1][: case.change.offset]
    return case.same_kind and "git" in head[-4000:].lower() and any(_GIT.search(line) for line in case.lines)


def file_list(case: Case) -> bool:
    named = re.search(r"(?i)files?\b|tree|director(?:y|ies)", _label(case))
    return (
        case.same_kind
        and case.shown
        and any(_PATH.match(line[:_LONGEST_PATH]) or (named and line) for line in case.lines)
    )


def environment(case: Case) -> bool:
    return (
        case.same_kind and _announced(case) and any(_ENVIRONMENT.search(text) for text in (*case.lines, _label(case)))
    )


def state(case: Case) -> bool:
    return (
        case.same_kind and _announced(case) and bool(_STATE.search(_label(case)) or _STATE.search(_key(case.lines[1])))
    )


def _announced(case: Case) -> bool:
    """Whether the text may be a client's block: anything before the conversation may, in it only text in a tag."""
    return case.shown and (case.in_head or any(f"<{label}" in case.texts[1] for label in case.labels))


def _label(case: Case) -> str:
    return " ".join(case.labels)


def _key(line: str) -> str:
    name, colon, _ = line.partition(":")
    return name if colon and len(name) <= 40 else ""


def moved(case: Case) -> bool:
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


def trimmed(case: Case) -> bool:
    after = case.after
    return after is not None and not case.in_head and any(piece.key == after.key for piece in case.following_before)


def inserted(case: Case) -> bool:
    before = case.before
    return before is not None and not case.in_head and any(piece.key == before.key for piece in case.following_after)


def compacted(case: Case) -> bool:
    if case.in_head or not case.both:
        return False
    kept = {piece.key for piece in case.following_before} & {piece.key for piece in case.following_after}
    return not kept and not alike(*case.texts) and 2 * len(case.following_after) < len(case.following_before)


def tool_result(case: Case) -> bool:
    return case.kinds == {Kind.RESULT}


def varying_first(case: Case) -> bool:
    """Whether two conversations begin with similar messages: one template filled twice."""
    named = bool(case.earlier.session) and case.earlier.session == case.later.session
    return case.kinds == {Kind.TEXT} and not named and not case.same_conversation


def new_conversation(case: Case) -> bool:
    if Kind.BLOCK in case.kinds:
        return case.difference.index == 0
    if case.earlier.session and case.earlier.session == case.later.session and not case.in_head:
        return False
    return case.other_conversation and not tools_reordered(case) and not _tools_flipped(case)
