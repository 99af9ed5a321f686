"""Runs a gateway, or a server of a model, until it is told to stop. Open requests may end first."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from programmable_kv.serve.app import gateway_app
from programmable_kv.serve.listening import bound, cannot_listen, close, port_of
from programmable_kv.serve.protocol import MOST_HEAD, ClientProtocol
from programmable_kv.serve.settings import GatewaySettings, Limits, LocalSettings

if TYPE_CHECKING:
    from programmable_kv.models.load import Model

_BACKLOG = 2048
_SWITCH_S = 5e-4
"""how long the observer's thread may hold up the event loop at a time; Python's own 5 ms would be most of a request's time"""
_POLL_S = 0.02
_MOMENT_S = 0.1
"""requests that end in this time are not worth a message"""
_CLEANUP_S = 10.0
"""how long requests whose connections were closed may take to end"""


class _Server(uvicorn.Server):
    """Says where it serves once it does. Told to stop, it says how long it waits for open requests, and then closes the
    connections of those that are left, so that they end as if their clients had gone."""

    def __init__(self, config: uvicorn.Config, limits: Limits, announcement: str) -> None:
        super().__init__(config)
        self._limits = limits
        self._announcement = announcement
        self._interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            for each in sockets or ():
                each.listen(_BACKLOG)
        except OSError as error:  # another program was faster to listen at the port
            raise cannot_listen(self.config.host, self.config.port, error) from error
        await super().startup(sockets)
        if self.started and self._announcement:
            _say(self._announcement)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)  # a second Ctrl-C sets force_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()  # at once where it is idle, else after its answer
        if not await self._ended(_MOMENT_S):
            await self._finish()
        await self.lifespan.shutdown()

    async def _finish(self) -> None:
        """Let open requests end, for a while or until a second Ctrl-C; then end them."""
        within_s, again = (self._limits.interrupt_s, " again") if self._interrupted else (self._limits.shutdown_s, "")
        number = f"{self._open} open request{'s' if self._open > 1 else ''}"
        _say(f"stopping: waiting up to {within_s:g} s for {number}; press Ctrl-C{again} to end at once")
        if not await self._ended(within_s):
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            if self.server_state.tasks:
                await asyncio.wait(set(self.server_state.tasks), timeout=_CLEANUP_S)

    async def _ended(self, within_s: float) -> bool:
        """Whether all requests ended in so many seconds, and before a second Ctrl-C."""
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        while self._open and not self.force_exit and loop.time() < end:
            await asyncio.sleep(_POLL_S)
        return not self._open

    @property
    def _open(self) -> int:
        """Requests that are worked on, or whose answers are still on their way."""
        return max(len(self.server_state.tasks), len(self.server_state.connections))


def server_of(settings: GatewaySettings | LocalSettings, app: Starlette, announcement: str = "") -> uvicorn.Server:
    """A server of an application, not yet running. It adds no headers of its own, and logs no paths, queries or bodies.

    Args:
        announcement: what it says on standard error once it serves.
    """
    config = uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        loop="auto",  # uvloop, where there is one for the system
        http=ClientProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=MOST_HEAD,
    )
    return _Server(config, settings.limits, announcement)


def run_gateway(settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        InvalidArgumentError: the port is in use, or cannot be listened at for another reason.
    """
    sys.setswitchinterval(_SWITCH_S)
    with _bound(settings) as (sockets, here):
        upstreams = ", ".join((settings.upstream, *settings.more_upstreams))
        told = f"{here}/v1 forwards to {upstreams}; report at {here}/pkv/report"
        server_of(settings, gateway_app(settings), told).run(sockets)


def run_local(load: Callable[[], Model], settings: LocalSettings) -> None:
    """Load a model and serve it until SIGINT or SIGTERM.

    Raises:
        InvalidArgumentError: the port is in use, or cannot be listened at for another reason; nothing was loaded.
    """
    from programmable_kv.serve.local.server import local_app

    with _bound(settings) as (sockets, here):
        model = load()
        told = f"{here}/v1 serves {model.name}; notebooks at {here}/v1/notebooks"
        server_of(settings, local_app(model, settings), told).run(sockets)


@contextmanager
def _bound(settings: GatewaySettings | LocalSettings) -> Iterator[tuple[list[socket.socket], str]]:
    """Sockets at the server's port, and its URL."""
    host = settings.host.strip("[]")
    sockets = bound(host, settings.port)
    try:
        yield sockets, f"http://{f'[{host}]' if ':' in host else host}:{port_of(sockets)}"
    finally:
        close(sockets)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
