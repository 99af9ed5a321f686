"""The excerpts that a report prints of two differing pieces: the line at fault. Opaque content is never printed."""

from __future__ import annotations

import json

from programmable_kv.explain.case import Case
from programmable_kv.explain.pieces import Kind, Piece, Request

_AROUND = 90
_MOST = 320


def excerpts(case: Case, key: str = "") -> tuple[str, str]:
    """The two texts around the first difference; the tools' or models' names if those are what differs."""
    if key:
        return (case.earlier.model, case.later.model) if key == "model" else ("", "")
    if Kind.TOOL in case.kinds:
        names = tuple(_tool_names(request) for request in (case.earlier, case.later))
        if names[0] != names[1]:
            return names[0], names[1]
    lines = [_around(piece, case.change.offset, 0) for piece in (case.before, case.after)]
    if lines[0] == lines[1] or not all(line.strip("…") for line in lines):  # a line more or less: show what follows
        lines = [_around(piece, case.change.offset, _AROUND) for piece in (case.before, case.after)]
    return lines[0], lines[1]


def _around(piece: Piece | None, offset: int, least: int) -> str:
    """A piece's text from the beginning of the line at `offset` to the first line end `least` or more characters on."""
    if piece is None:
        return ""
    if piece.secret:
        return f"({piece.kind}, {piece.nbytes:,} bytes, not shown)"
    if piece.kind is Kind.BLOCK:
        return ""
    text = piece.text
    start = max(0, text.rfind("\n", 0, offset) + 1, offset - _AROUND)
    stop = min(len(text), offset + _MOST - (offset - start))
    end = text.find("\n", min(len(text), offset + least))
    stop = stop if end < 0 else min(stop, end)
    shown = text[start:stop]
    return f"{'…' if start else ''}{shown}{'…' if stop < len(text) else ''}"


def _tool_names(request: Request) -> str:
    names = []
    for piece in request.pieces:
        if piece.kind is Kind.TOOL:
            tool = json.loads(piece.text)
            inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
            names.append(str(inner.get("name") or inner.get("type") or "?"))
    return ", ".join(names)
