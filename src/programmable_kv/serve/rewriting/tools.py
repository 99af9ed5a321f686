"""Identifies each tool of a request, so that the same tools in another order are sent in the earlier order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from programmable_kv.serve.rewriting.body import Body, Spot, read, written

MARKER = "cache_control"
_TOOLS = "tools"


_CLIENTS = ("function", "custom")
"""Types of tools that the client runs. It also runs tools of Messages without a type. A server may run any other."""
_HOSTED = ("mcp_servers", "web_search_options", "container", "plugins", "prompt")
"""Members with which a server may run something itself, or that name a stored prompt, which may have tools."""


def may_act(body: Body) -> bool:
    """Whether a server may do more with a request than answer it: search, run code, or call another server."""
    tools = body.data.get(_TOOLS) or []
    return any(body.data.get(name) not in (None, False, "", []) for name in _HOSTED) or not (
        isinstance(tools, list)
        and all(isinstance(tool, Mapping) and tool.get("type", "custom") in _CLIENTS for tool in tools)
    )


def digests_of(body: Body) -> tuple[str, tuple[str, ...]]:
    """A digest of all tools, and one of each tool, in order. The order of keys counts: templates keep it."""
    tools = plain(body.data.get(_TOOLS))
    if _TOOLS not in body.items:
        return _digest(json.dumps(tools)), ()
    each = [json.dumps(tool) for tool in tools]
    return _digest(f"[{', '.join(each)}]"), tuple(map(_digest, each))


def in_order(body: Body, came: Sequence[str], order: Sequence[str]) -> tuple[Spot, str]:
    """The place of the tools in the body, and their text in another order.

    Caching markers stay at their places in the list. Every other byte of each tool is unchanged.

    Args:
        came: a digest of each tool of the body.
        order: the same digests in the wanted order.
    """
    tools, spots = body.data[_TOOLS], body.items[_TOOLS]
    parts = []
    for place, at in enumerate(_places(came, order)):
        text = body.text[spots[at].start : spots[at].stop]
        marker = _marker(tools[place])
        parts.append(text if marker == _marker(tools[at]) else _marked(text, tools[at], marker))
    return body.spots[_TOOLS], f"[{','.join(parts)}]"


def bytes_moved(body: Body, came: Sequence[str], order: Sequence[str]) -> int:
    """Bytes of the tools from the first one that has another place in the other order."""
    spots = body.items[_TOOLS]
    first = next(at for at, (one, other) in enumerate(zip(came, order, strict=True)) if one != other)
    return len(body.text[spots[first].start : spots[-1].stop].encode())


def are_the_same(came: Sequence[str], others: Sequence[str]) -> bool:
    """Whether both are the same tools, in any order."""
    return bool(others) and sorted(came) == sorted(others)


def plain(value: Any) -> Any:
    """A value without its `cache_control` markers. They are not content: clients move them from turn to turn."""
    if isinstance(value, Mapping):
        return {key: each for key, each in value.items() if key != MARKER}
    return [plain(each) for each in value] if isinstance(value, list) else value


def _places(came: Sequence[str], order: Sequence[str]) -> list[int]:
    """The index in the body of each tool of an order. Equal tools are taken one after the other."""
    known: dict[str, list[int]] = {}
    for at, each in enumerate(came):
        known.setdefault(each, []).append(at)
    return [known[each].pop(0) for each in order]


def _marker(tool: Any) -> dict[str, Any]:
    return {MARKER: tool[MARKER]} if isinstance(tool, Mapping) and MARKER in tool else {}


def _marked(text: str, tool: Mapping[str, Any], marker: Mapping[str, Any]) -> str:
    """A tool with another marker, or none. Its other bytes stay: parsed and written again, a number may lose digits."""
    if MARKER in tool:
        known = read(text.encode("utf-8", "surrogatepass"))
        key = f'"{MARKER}"'
        if known is None or key not in text:  # the name is given twice, or written with escapes
            return written({**plain(tool), **marker})
        spot = known.spots[MARKER]
        before, behind = text[: text.rindex(key, 0, spot.start)].rstrip(), text[spot.stop :].lstrip()
        if behind.startswith(","):
            behind = behind[1:].lstrip()
        else:
            before = before.removesuffix(",").rstrip()
        text = before + behind
    if not marker:
        return text
    rest = text[1:].lstrip()
    between = "" if rest == "}" else ","
    return f"{{{written(marker)[1:-1]}{between}{rest}"


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()
