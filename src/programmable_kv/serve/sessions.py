"""The latest requests of each conversation, in bounded memory: the longest silent conversation is forgotten first."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice

from programmable_kv.explain.difference import common_bytes
from programmable_kv.explain.history import History
from programmable_kv.explain.pieces import HEAD, Piece, Request
from programmable_kv.serve.observation import Tally

_KEPT = 8
"""requests kept of one conversation; several, because sub-agents share a session's name and take turns"""
_OTHERS = 8
"""requests of other conversations that one is compared with; single questions share no message, only a system prompt"""
_LOOKED_AT = 64
"""how many conversations are searched for those"""
_PIECE_BYTES = 700
"""memory of a piece besides its text: objects, keys, its entry in the index"""
_SESSION_BYTES = 4000


@dataclass(slots=True)
class Session:
    """One conversation of one tenant."""

    key: tuple[str, str]
    """tenant and name"""
    requests: deque[Request] = field(default_factory=lambda: deque(maxlen=_KEPT), repr=False)
    tally: Tally = field(default_factory=Tally)
    nbytes: int = _SESSION_BYTES
    said: set[bytes] = field(default_factory=set, repr=False)
    """keys of messages by which it is found"""

    @property
    def public_name(self) -> str:
        """A name that can be shown: a client's own name for a session may be a secret."""
        return blake2b("\0".join(self.key).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


class Sessions:
    """All conversations. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.nbytes = 0
        self.evicted = 0
        self._max_bytes = max_bytes
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._said: dict[tuple[str, bytes], tuple[str, str]] = {}
        """tenant and a message's key -> the latest conversation with it that has no name of its own"""

    def __len__(self) -> int:
        return len(self._sessions)

    def of_tenant(self, tenant: str) -> Iterator[Session]:
        """The tenant's conversations, the latest first."""
        return (session for session in reversed(self._sessions.values()) if session.key[0] == tenant)

    def find(self, tenant: str, request: Request) -> Session:
        """The conversation that a request continues, or a new one."""
        if request.session:
            key = (tenant, f"named {request.session}")
            return self._sessions.get(key) or Session(key)
        messages = [piece for piece in request.pieces if piece.kind not in HEAD]
        keys = (self._said.get((tenant, piece.key)) for piece in (*messages[:3], *messages[-6:]))
        found = [self._sessions[key] for key in dict.fromkeys(keys) if key is not None]
        if not found:
            return Session((tenant, f"found {request.number}"))
        return max(found, key=lambda session: common_bytes(session.requests[-1], request))

    def history(self, session: Session, request: Request) -> History:
        """What a request is compared with: its own conversation's latest requests, and other conversations' last ones."""
        recent = islice(self.of_tenant(session.key[0]), _LOOKED_AT)
        others = [
            each.requests[-1] for each in recent if each is not session and each.requests[-1].cache == request.cache
        ]
        history = History()
        for one in sorted((*others[:_OTHERS], *session.requests), key=lambda each: each.number):
            history.add(one)
        return history

    def keep(self, session: Session, request: Request) -> None:
        """Remember a request as sent, and forget the conversations that were silent longest if there is no room."""
        if session.key in self._sessions:
            self.nbytes -= session.nbytes
        known = {_same(piece): piece for each in session.requests for piece in each.pieces}
        pieces = tuple(known.get(_same(piece), piece) for piece in request.pieces)
        session.requests.append(replace(request, pieces=pieces))
        session.nbytes = _SESSION_BYTES + sum(
            _PIECE_BYTES + sys.getsizeof(piece.text)
            for piece in {id(piece): piece for each in session.requests for piece in each.pieces}.values()
        )
        self.nbytes += session.nbytes
        self._sessions[session.key] = session
        self._sessions.move_to_end(session.key)
        if not request.session:
            self._index(session)
        while self.nbytes > self._max_bytes and self._sessions:
            self._forget(next(iter(self._sessions.values())))

    def _index(self, session: Session) -> None:
        tenant = session.key[0]
        said = {piece.key for each in session.requests for piece in each.pieces if piece.kind not in HEAD}
        for key in session.said - said:
            self._unindex(session, key)
        for key in said:
            self._said[tenant, key] = session.key
        session.said = said

    def _forget(self, session: Session) -> None:
        del self._sessions[session.key]
        self.nbytes -= session.nbytes
        self.evicted += 1
        for key in session.said:
            self._unindex(session, key)

    def _unindex(self, session: Session, key: bytes) -> None:
        if self._said.get((session.key[0], key)) == session.key:
            del self._said[session.key[0], key]


def _same(piece: Piece) -> tuple[bytes, str, bool]:
    return piece.key, piece.path, piece.marked
