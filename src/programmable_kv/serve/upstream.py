"""The client of a gateway: sends a request as bytes, and hands on the answer as bytes while it arrives."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import httpx2

from programmable_kv.serve.headers import Headers
from programmable_kv.serve.refusal import (
    UPSTREAM_BROKEN,
    UPSTREAM_DIED,
    UPSTREAM_SILENT,
    UPSTREAM_UNREACHABLE,
    Refusal,
    RefusedError,
)

_KEEP_S = 4.0
"""an idle connection is kept for less than the five seconds after which uvicorn, and so vLLM, closes it"""


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """What is sent."""

    method: str
    target: bytes
    """path and query, byte for byte"""
    headers: Headers
    body: bytes = field(repr=False)


class UpstreamAnswer(Protocol):
    """What came back."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Read once.

        Raises:
            RefusedError: the upstream dies, or is silent for too long.
        """
        ...

    async def close(self) -> None:
        """End the exchange. An answer that is not complete is given up, which the upstream sees as a client that left."""
        ...


class Upstream(Protocol):
    """Where requests go."""

    async def send(self, request: UpstreamRequest) -> UpstreamAnswer:
        """Send a request. Returns once the headers of the answer have come; the caller closes the answer.

        Raises:
            RefusedError: there is no answer.
        """
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class HttpUpstream:
    """An upstream reached by HTTP/1.1 over pooled connections.

    It is httpx2's transport without its client: no header is added, no redirect followed, no cookie kept, no body decoded, and
    no proxy taken from the environment.
    """

    def __init__(self, url: str, *, connections: int, connect_s: float, read_s: float) -> None:
        """
        Args:
            url: scheme, host and port; a path is left to the requests.
            connections: how many are open at most.
        """
        parts = urlsplit(url)
        self._url = httpx2.URL(f"{parts.scheme}://{parts.netloc}/")
        self._timeouts = {"connect": connect_s, "read": read_s, "write": read_s, "pool": connect_s}
        self._transport = httpx2.AsyncHTTPTransport(
            verify=ssl.create_default_context() if parts.scheme == "https" else False,
            limits=httpx2.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_S
            ),
            trust_env=False,
        )

    async def send(self, request: UpstreamRequest) -> UpstreamAnswer:
        """See `Upstream.send`."""
        built = httpx2.Request(
            request.method,
            self._url,
            headers=list(request.headers),
            stream=httpx2.ByteStream(request.body),
            extensions={"target": request.target, "timeout": self._timeouts},
        )
        try:
            return _HttpAnswer(await self._transport.handle_async_request(built))
        except httpx2.TransportError as error:
            raise RefusedError(_refusal(error)) from error

    async def close(self) -> None:
        """See `Upstream.close`."""
        await self._transport.aclose()


class _HttpAnswer:
    def __init__(self, answer: httpx2.Response) -> None:
        self._answer = answer

    @property
    def status(self) -> int:
        return self._answer.status_code

    @property
    def headers(self) -> Headers:
        return tuple(self._answer.headers.raw)

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.aiter_raw():
                yield chunk
        except httpx2.ReadTimeout as error:
            raise RefusedError(UPSTREAM_SILENT) from error
        except httpx2.TransportError as error:
            raise RefusedError(UPSTREAM_DIED) from error

    async def close(self) -> None:
        await self._answer.aclose()


def _refusal(error: httpx2.TransportError) -> Refusal:
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return UPSTREAM_UNREACHABLE
    return UPSTREAM_SILENT if isinstance(error, httpx2.TimeoutException) else UPSTREAM_BROKEN
