"""The requests so far, as a prefix cache remembers them: a tree of pieces finds the longest prefix that is shared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from programmable_kv.explain.difference import Difference, common_bytes, first_difference, shared_characters
from programmable_kv.explain.pieces import HEAD, Piece, Request

_CHILDREN = 64
"""how many of the latest continuations of one prefix are compared character by character"""


@dataclass(slots=True)
class _Node:
    """A prefix that some request had; `latest` is the last of them."""

    latest: Request
    children: dict[bytes, _Node] = field(default_factory=dict)


@dataclass(slots=True)
class History:
    """Earlier requests. `nearest` and `counterpart` do not change it."""

    _roots: dict[tuple[str, str], _Node] = field(default_factory=dict)
    _sessions: dict[str, Request] = field(default_factory=dict)
    _said: dict[bytes, Request] = field(default_factory=dict)
    """a message's key -> the latest request with it"""

    def add(self, request: Request) -> None:
        """Remember a request as sent."""
        node = self._roots.setdefault(request.cache, _Node(request))
        node.latest = request
        for piece in request.pieces:
            child = node.children.pop(piece.key, None) or _Node(request)
            node.children[piece.key] = child  # the latest stand last
            child.latest = request
            node = child
        if request.session:
            self._sessions[request.session] = request
        for piece in request.pieces:
            if piece.kind not in HEAD:
                self._said[piece.key] = request

    def nearest(self, request: Request) -> Difference | None:
        """The request that shares the longest prefix in the same cache: what a prefix cache finds. The latest of equals."""
        node = self._roots.get(request.cache)
        if node is None:
            return None
        index = 0
        while index < len(request.pieces):
            child = node.children.get(request.pieces[index].key)
            if child is None:
                break
            node, index = child, index + 1
        best = node.latest
        if index < len(request.pieces) and node.children:
            piece = request.pieces[index]
            latest = list(node.children.values())[-_CHILDREN:]
            best = max(latest, key=lambda child: _part(child.latest, index, piece)).latest
        return first_difference(best, request)

    def counterpart(self, request: Request, nearest: Difference | None) -> Difference | None:
        """The earlier request that this one continues: the one with the most text in common, of the same session.

        Where a clock stands at the top, a prefix says little about what was continued: what both hold, anywhere, does.
        """
        same = self._sessions.get(request.session) if request.session else None
        found = [nearest.earlier if nearest is not None else None, same]
        messages = [piece for piece in request.pieces if piece.kind not in HEAD]
        found += [self._said.get(piece.key) for piece in (*messages[:3], *messages[-6:])]
        candidates = _distinct(found)
        if not candidates:
            return None
        own = same.number if same is not None else None
        # A session's name alone does not do: sub-agents send it too.
        best = max(
            candidates,
            key=lambda one: (
                common_bytes(one, request),
                one.number == own,
                one.cache == request.cache,
                first_difference(one, request).equal_bytes,
                one.number,
            ),
        )
        return first_difference(best, request)


def same_conversation(one: Request, other: Request) -> bool:
    """Whether two requests have a message in common, apart from tools and system prompt."""
    said = {piece.key for piece in one.pieces if piece.kind not in HEAD}
    return any(piece.key in said for piece in other.pieces if piece.kind not in HEAD)


def _part(request: Request, index: int, piece: Piece) -> tuple[int, int]:
    return shared_characters(request.pieces[index], piece), request.number


def _distinct(requests: Iterable[Request | None]) -> list[Request]:
    return list({request.number: request for request in requests if request is not None}.values())
