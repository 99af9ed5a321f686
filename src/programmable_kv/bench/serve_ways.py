"""The ways to an upstream that the gateway's bench compares, with each way's requests and checks of the answers."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from programmable_kv.bench.fixed_upstream import events, said_in
from programmable_kv.bench.http_client import Timed
from programmable_kv.bench.serve_peers import Peer

DIRECT = "direct"
MODES = ("pass", "observe", "erratum")
LITELLM = "litellm"
_ANSWER = b"".join(events())
_SAID = said_in(_ANSWER)


def checked(answer: Timed) -> Timed:
    """
    Raises:
        ConnectionError: the answer is not the upstream's, byte for byte.
    """
    if answer.body != _ANSWER:
        raise ConnectionError(f"an answer differs from the upstream's: {answer.body[:200]!r}")
    return answer


def checked_text(answer: Timed) -> Timed:
    """The check for a proxy that rewrites its answers.

    Raises:
        ConnectionError: the answer's text is not the upstream's.
    """
    if said_in(answer.body) != _SAID:
        raise ConnectionError(f"an answer's text differs from the upstream's: {answer.body[:200]!r}")
    return answer


@dataclass(slots=True)
class Way:
    """One way to the upstream: direct, or through a gateway."""

    name: str
    peer: Peer
    check: Callable[[Timed], Timed] = checked
    began: int = 0
    """Number of conversations opened."""
    idle: int = 0
    """How many of them were opened to stay idle."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ours(self) -> bool:
        """Whether the way goes through a gateway of this package."""
        return self.name in MODES

    def requests(self, bodies: Sequence[bytes]) -> Iterator[tuple[bytes, str]]:
        """Endless requests of successive conversations, each as a body and its conversation's name."""
        while True:
            with self.lock:
                self.began += 1
                name = f"{self.name}-{self.began}"
            for body in bodies:
                yield body, name

    def wait_until_quiet(self) -> None:
        if self.ours:
            self.peer.wait_until_quiet()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile of at least two values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{part}_ms": round(cuts[part - 1], 3) for part in (50, 90, 99)}
