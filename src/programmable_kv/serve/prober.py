"""Asks an upstream to render small conversations, to find out in which roles a line reaches the model.

These are requests of the gateway's own. They compute nothing at the upstream, and no client waits for them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from programmable_kv.serve.aside import Aside
from programmable_kv.serve.rewriting.prompt import CHAT
from programmable_kv.serve.rewriting.rendering import MadeUp, Probe, thoughts_in, verdict_of
from programmable_kv.serve.rewriting.rewriter import REFUSALS, Rewriter, Rewriting

_LOG = logging.getLogger("programmable_kv.serve")
_AGAIN_S = 3600.0
"""Seconds until a template is probed again: a server may restart with another template under the same model name."""
_SOON_S = 60.0
"""Seconds until the next probe after a failure that says nothing about the template."""
_WITHIN_S = 60.0
_AT_ONCE = 4
_REMEMBERED = 4096
_LONGEST_NAME = 256
"""The most characters of a model's name. A longer name is not a real one, and is not probed."""
_NOT_THERE = (404, 405, 501)
_DENIED = (401, 403, 404)
"""Statuses that may be due to the credentials of one client."""
_FAULTS = 500
"""Statuses from this one on are faults of the server itself."""
_SUCCESS = range(200, 300)

Ask = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""Sends a body to a path of the upstream. Returns the status and the body of the answer."""


class _NoRendererError(Exception):
    """The upstream does not render conversations at this path."""


class _UndecidedError(Exception):
    """The answer says nothing about the template. The server may be busy, for example."""


class _RefusedError(Exception):
    """The upstream refused a body, or failed at it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_Key = tuple[type[Rewriter], Probe, str]
"""The subject of a probe, and the tenant for which the waiting time holds; an empty tenant stands for all tenants."""


class Prober:
    """Finds out which lines reach a model. Use it from one event loop."""

    def __init__(self, aside: Aside) -> None:
        self._aside = aside
        self._next: OrderedDict[_Key, float] = OrderedDict()
        """key -> the `time.monotonic()` from which it may be probed again"""
        self._running: set[asyncio.Task[None]] = set()

    def look(self, work: Rewriting, ask: Ask) -> None:
        """Start a probe for a request's conversation, unless a recent one covers it. Returns at once.

        Args:
            work: a request that the upstream answered with success. So the model exists, and the client may use it.
        """
        probe = work.by.probe_of(work)
        if probe is None or len(probe.model) > _LONGEST_NAME or len(self._running) >= _AT_ONCE:
            return
        now = time.monotonic()
        shared, own = (type(work.by), probe, ""), (type(work.by), probe, work.tenant)
        if now < max(self._next.get(key, 0.0) for key in (shared, own)):
            return
        self._wait(shared, now + _WITHIN_S + _SOON_S)
        task = asyncio.get_running_loop().create_task(self._probe(work.by, shared, own, ask))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancel the probes that run."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _wait(self, key: _Key, until: float) -> None:
        self._next[key] = until
        self._next.move_to_end(key)
        if len(self._next) > _REMEMBERED:
            self._next.popitem(last=False)

    async def _probe(self, by: Rewriter, shared: _Key, own: _Key, ask: Ask) -> None:
        probe, wait_s, denied = shared[1], _SOON_S, False
        found: dict[str, str] = {}

        async def asked(path: str, data: bytes) -> tuple[int, bytes]:
            nonlocal denied
            status, answer = await ask(path, data)
            denied = denied or status in _DENIED
            return status, answer

        try:
            async with asyncio.timeout(_WITHIN_S):
                found = await renderings(probe, asked)
            if found:
                await self._aside.run(by.accepted.rendered, probe.route, probe.model, found)
            wait_s = _AGAIN_S
        except Exception as error:  # without a verdict, lines stay where they are safe
            _LOG.info("%s: could not find out which lines reach the model (%s)", probe.route, type(error).__name__)
        if denied and not found:  # another tenant may be allowed to ask
            self._next.pop(shared, None)
            self._wait(own, time.monotonic() + _AGAIN_S)
        else:
            self._wait(shared, time.monotonic() + wait_s)


async def renderings(probe: Probe, ask: Ask) -> dict[str, str]:
    """The verdicts from renderings: the name of a verdict -> the verdict. Empty if the upstream renders nothing.

    Raises:
        _UndecidedError: the answers do not show whether the upstream renders conversations.
        RefusedError: the upstream cannot be reached.
    """
    found: dict[str, str] = {}
    paths = ("/tokenize", "/apply-template") if probe.route == CHAT else (f"{probe.route}/render",)
    path = None
    for tools in (False, True):
        plain = probe.without_lines(tools=tools)
        path, _ = await _renderer(plain, paths, ask)
        if path is not None:
            found |= await _verdicts(path, plain, probe.with_lines(tools=tools), ask)
    thinking = probe.thinking()
    if path is not None and thinking is not None:
        path, text = await _renderer(thinking, (path,), ask)
        if path is not None:
            found |= await _verdicts(path, thinking, probe.thinking_with_lines(), ask, thoughts=thoughts_in(text))
    return found


async def _verdicts(
    path: str, plain: MadeUp, with_lines: Iterable[tuple[str, MadeUp]], ask: Ask, *, thoughts: int = 0
) -> dict[str, str]:
    """The verdicts from conversations with lines: the name of a verdict -> the verdict.

    A refusal is a verdict only if the upstream repeats it and still renders the plain conversation. A fault of the
    server (a status from 500 on) never is.

    Raises:
        _UndecidedError: the upstream does not render the plain conversation any more.
    """
    found: dict[str, str] = {}
    for about, made in with_lines:
        text, statuses = await _twice(path, made, ask)
        if text is None:
            if (await _renderer(plain, (path,), ask))[0] is None:
                raise _UndecidedError(path)
            if any(status >= _FAULTS for status in statuses):
                continue
        found[about] = verdict_of(made, text, thoughts=thoughts)
    return found


async def _renderer(plain: MadeUp, paths: tuple[str, ...], ask: Ask) -> tuple[str | None, str | None]:
    """The first path at which the upstream renders a conversation without lines, and the rendering; or None."""
    for path in paths:
        try:
            text, _ = await _twice(path, plain, ask)
        except _NoRendererError:
            continue
        if text is not None and plain.is_whole(text):
            return path, text
    return None, None


async def _twice(path: str, made: MadeUp, ask: Ask) -> tuple[str | None, list[int]]:
    """A rendering, with one retry after a refusal; None if both are refused. Also returns the refusals' statuses."""
    statuses: list[int] = []
    while len(statuses) < 2:
        try:
            return await _rendering(path, made, ask), statuses
        except _RefusedError as error:
            statuses.append(error.status)
    return None, statuses


async def _rendering(path: str, made: MadeUp, ask: Ask) -> str:
    """The text of a conversation as the model would read it.

    vLLM renders Chat Completions to token ids at `/tokenize`. It renders the other protocols at paths of their own if
    it was started with --enable-scale-out. llama-server renders to text.

    Raises:
        _NoRendererError: the upstream does not render at this path.
        _RefusedError: the upstream refused the conversation, or failed at it.
        _UndecidedError: the answer has another status. The upstream may be busy, for example.
    """
    answer = await _asked(path, made.body, ask)
    if isinstance(answer.get("prompt"), str):
        return str(answer["prompt"])
    ids = answer.get("token_ids", answer.get("tokens"))
    if not isinstance(ids, list) or not ids:
        raise _NoRendererError(path)
    try:
        text = await _asked("/detokenize", {"model": made.body["model"], "tokens": ids}, ask)
    except _RefusedError as error:
        if error.status >= _FAULTS:
            raise
        raise _NoRendererError("/detokenize") from error  # this refusal says nothing about the conversation
    found = text.get("prompt", text.get("content"))
    if not isinstance(found, str):
        raise _NoRendererError("/detokenize")
    return found


async def _asked(path: str, body: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
    """The upstream's answer as JSON data. It raises the errors of `_rendering`."""
    status, data = await ask(path, json.dumps(body).encode())
    if status in REFUSALS:
        raise _RefusedError(status)
    if status in _NOT_THERE:
        raise _NoRendererError(path)
    if status not in _SUCCESS:
        raise _UndecidedError(path)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _NoRendererError(path) from error
    if not isinstance(found, dict):
        raise _NoRendererError(path)
    return found
