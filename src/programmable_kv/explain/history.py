"""Earlier requests, stored as a prefix cache does: a tree of pieces in which the longest shared prefix is looked up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from programmable_kv.explain.difference import Difference, common_bytes, first_difference, shared_characters
from programmable_kv.explain.pieces import HEAD, Piece, Request

_CHILDREN = 64
"""The number of a prefix's latest continuations that are compared character by character."""


@dataclass(slots=True)
class _Node:
    """A prefix of earlier requests; `latest` is the latest request that begins with it."""

    latest: Request
    children: dict[bytes, _Node] = field(default_factory=dict)


@dataclass(slots=True)
class History:
    """Earlier requests. `nearest` and `counterpart` do not change it."""

    _roots: dict[tuple[str, str], _Node] = field(default_factory=dict)
    _sessions: dict[str, Request] = field(default_factory=dict)
    _said: dict[bytes, Request] = field(default_factory=dict)
    """The key of each piece of a message -> the latest request with that piece."""

    def add(self, request: Request) -> None:
        """Add a request to the history."""
        node = self._roots.setdefault(request.cache, _Node(request))
        node.latest = request
        for piece in request.pieces:
            child = node.children.pop(piece.key, None) or _Node(request)
            node.children[piece.key] = child  # keeps the latest last
            child.latest = request
            node = child
        if request.session:
            self._sessions[request.session] = request
        for piece in request.pieces:
            if piece.kind not in HEAD:
                self._said[piece.key] = request

    def nearest(self, request: Request) -> Difference | None:
        """The comparison with the request of the same cache that shares the longest prefix, the latest of equals."""
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
        """The comparison with the earlier request that this one continues: the one with the most text in common.

        Text in common counts wherever it stands, since a clock at the top leaves almost no common prefix. Of requests
        with as much, the one of the same session is preferred.
        """
        same = self._sessions.get(request.session) if request.session else None
        found = [nearest.earlier if nearest is not None else None, same]
        messages = [piece for piece in request.pieces if piece.kind not in HEAD]
        found += [self._said.get(piece.key) for piece in (*messages[:3], *messages[-6:])]
        candidates = _distinct(found)
        if not candidates:
            return None
        own = same.number if same is not None else None
        # The session's name alone is not enough: sub-agents send it too.
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
