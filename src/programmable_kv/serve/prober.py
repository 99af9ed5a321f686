"""Requests of the gateway's own that ask an upstream to render a small conversation: they show in which role a line reaches the
model. They compute nothing, and no client waits for them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from programmable_kv.serve.aside import Aside
from programmable_kv.serve.rewriting.prompt import CHAT
from programmable_kv.serve.rewriting.rendering import MadeUp, Probe, verdict_of
from programmable_kv.serve.rewriting.rewriter import REFUSALS, Rewriter, Rewriting

_LOG = logging.getLogger("programmable_kv.serve")
_AGAIN_S = 3600.0
"""a server may be started again with another template under the same name"""
_SOON_S = 60.0
"""after a failure that says nothing about the template"""
_WITHIN_S = 60.0
_AT_ONCE = 4
_REMEMBERED = 4096
_NOT_THERE = (404, 405, 501)
_SUCCESS = range(200, 300)

Ask = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""sends a body to a path of the upstream: the status of the answer, and its body"""


class _NoRendererError(Exception):
    """The upstream does not render at this path."""


class _UndecidedError(Exception):
    """The answer says nothing about the template: the server is busy, say."""


class Prober:
    """Finds out which lines reach a model. For one event loop."""

    def __init__(self, aside: Aside) -> None:
        self._aside = aside
        self._next: OrderedDict[tuple[type[Rewriter], Probe], float] = OrderedDict()
        """when each is asked again"""
        self._running: set[asyncio.Task[None]] = set()

    def look(self, work: Rewriting, ask: Ask) -> None:
        """Begin to find out what a request's conversation needs, unless that was done a short while ago. Returns at once."""
        probe = work.by.probe_of(work)
        if probe is None:
            return
        key = (type(work.by), probe)
        now = time.monotonic()
        if now < self._next.get(key, 0.0) or len(self._running) >= _AT_ONCE:
            return
        self._wait(key, now + _WITHIN_S + _SOON_S)
        task = asyncio.get_running_loop().create_task(self._probe(work.by, probe, ask))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Stop what runs."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _wait(self, key: tuple[type[Rewriter], Probe], until: float) -> None:
        self._next[key] = until
        self._next.move_to_end(key)
        if len(self._next) > _REMEMBERED:
            self._next.popitem(last=False)

    async def _probe(self, by: Rewriter, probe: Probe, ask: Ask) -> None:
        wait_s = _SOON_S
        try:
            async with asyncio.timeout(_WITHIN_S):
                found = await renderings(probe, ask)
            if found:
                await self._aside.run(by.accepted.rendered, probe.route, probe.model, found)
            wait_s = _AGAIN_S
        except Exception as error:  # lines stay where they are safe, and no request is harmed
            _LOG.info("%s: it was not found out which lines reach the model (%s)", probe.route, type(error).__name__)
        self._wait((type(by), probe), time.monotonic() + wait_s)


async def renderings(probe: Probe, ask: Ask) -> dict[str, str]:
    """What renderings show: about what, and the verdict. Empty where the upstream renders nothing.

    Raises:
        _UndecidedError: it did not answer as a server does that renders, nor as one that does not.
        RefusedError: it cannot be reached.
    """
    found: dict[str, str] = {}
    paths = ("/tokenize", "/apply-template") if probe.route == CHAT else (f"{probe.route}/render",)
    for tools in (False, True):
        path = await _renderer(probe.without_lines(tools=tools), paths, ask)
        if path is None:
            continue
        for about, made in probe.with_lines(tools=tools):
            found[about] = verdict_of(made, await _rendering(path, made, ask))
    return found


async def _renderer(plain: MadeUp, paths: tuple[str, ...], ask: Ask) -> str | None:
    """The path at which the upstream renders a conversation that holds no line; None where there is none."""
    for path in paths:
        try:
            text = await _rendering(path, plain, ask)
        except _NoRendererError:
            continue
        if text is not None and plain.is_whole(text):
            return path
    return None


async def _rendering(path: str, made: MadeUp, ask: Ask) -> str | None:
    """A conversation as the model would read it; None where it is refused.

    vLLM renders Chat Completions to token ids at `/tokenize`, and the other protocols at paths of their own, where it was
    started with --enable-scale-out. llama-server renders to text.
    """
    answer = await _asked(path, made.body, ask)
    if answer is None:
        return None
    if isinstance(answer.get("prompt"), str):
        return str(answer["prompt"])
    ids = answer.get("token_ids", answer.get("tokens"))
    if not isinstance(ids, list) or not ids:
        raise _NoRendererError(path)
    text = await _asked("/detokenize", {"model": made.body["model"], "tokens": ids}, ask)
    found = text.get("prompt", text.get("content")) if text is not None else None
    if not isinstance(found, str):
        raise _NoRendererError("/detokenize")
    return found


async def _asked(path: str, body: Mapping[str, Any], ask: Ask) -> dict[str, Any] | None:
    """The answer as data; None where the upstream refused what the body says."""
    status, data = await ask(path, json.dumps(body).encode())
    if status in REFUSALS:
        return None
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
