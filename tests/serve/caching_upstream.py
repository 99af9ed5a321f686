"""An upstream with a real prefix cache over rendered text. Like servers, it reports cache hits in its usage numbers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from serve.http_peers import EVENTS_HEAD, LAST, Received, answer, chunk

RENDERS = (
    b"/tokenize",
    b"/detokenize",
    b"/apply-template",
    *(b"/v1/%b/render" % name for name in (b"messages", b"responses")),
)
"""The paths at which servers render prompts."""
BLOCK = 16
"""The characters in a block of the cache. A block counts as one token."""


class CachingUpstream:
    """A script for `raw_upstream` that answers from a prefix cache."""

    def __init__(
        self, *, folds: bool = False, refuses: Callable[[Any], bool] = lambda _: False, status: str = "400 Bad Request",
        reads: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            folds: move system messages of the conversation to the head, as the servers of some templates do.
            refuses: says which bodies get an error.
            status: the status of this error.
            reads: whether requests may find anything in the cache.
        """
        self.folds, self.refuses, self.status, self.reads = folds, refuses, status, reads
        self.cache: set[str] = set()
        self.bodies: list[Any] = []
        """The bodies that got an answer."""
        self.counts: list[tuple[int, int]] = []
        """For each of these bodies: its tokens, and how many of them were read from the cache."""
        self.refused = 0

    async def __call__(self, request: Received) -> AsyncIterator[bytes]:
        if request.target in RENDERS:
            for part in self.rendering(request):
                yield part
            return
        body = request.json
        if self.refuses(body):
            self.refused += 1
            yield answer(b'{"error": {"message": "a template raised"}}', self.status)
            return
        self.bodies.append(body)
        total, cached = self._read(self._rendered(body))
        self.counts.append((total, cached))
        chat = b"chat" in request.target
        if b"responses" in request.target:
            yield answer(json.dumps(_response(total, cached)).encode())
            return
        if body.get("stream") and chat:
            yield EVENTS_HEAD
            for event in _chunks(total, cached):
                yield chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            yield chunk(b"data: [DONE]\n\n") + LAST
        else:
            yield answer(json.dumps(_completion(total, cached) if chat else _message(total, cached)).encode())

    def rendering(self, request: Received) -> list[bytes]:
        """The answer to a request to render a prompt: 404, as from a hosted API."""
        del request
        return [answer(b'{"detail": "Not Found"}', "404 Not Found")]

    def _rendered(self, body: Any) -> str:
        messages = list(body.get("messages") or body["input"])
        system = body.get("system") or body.get("instructions") or ""
        if self.folds:
            inside = [m for m in messages[1:] if m["role"] == "system"]
            messages = [*messages[:1], *inside, *(m for m in messages[1:] if m["role"] != "system")]
        return json.dumps([body.get("tools"), system, *messages])

    def _read(self, text: str) -> tuple[int, int]:
        blocks = [text[: start + BLOCK] for start in range(0, len(text) - BLOCK + 1, BLOCK)]
        cached = 0
        while self.reads and cached < len(blocks) and blocks[cached] in self.cache:
            cached += 1
        self.cache.update(blocks)
        return len(text) // BLOCK + 1, cached


def _chunks(total: int, cached: int) -> list[Any]:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    said = {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Yes."}}]}
    return [said, {**head, "choices": [], "usage": _completion(total, cached)["usage"]}]


def _completion(total: int, cached: int) -> dict[str, Any]:
    return {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}],
        "usage": {"prompt_tokens": total, "completion_tokens": 1, "total_tokens": total + 1,
                  "prompt_tokens_details": {"cached_tokens": cached}},
    }  # fmt: skip


def _response(total: int, cached: int) -> dict[str, Any]:
    said = {"type": "output_text", "text": "Yes.", "annotations": []}
    return {
        "id": "r", "object": "response", "created_at": 1, "model": "m", "status": "completed", "parallel_tool_calls": True,
        "tool_choice": "auto", "tools": [],
        "output": [{"id": "o", "type": "message", "role": "assistant", "status": "completed", "content": [said]}],
        "usage": {"input_tokens": total, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": 1,
                  "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": total + 1},
    }  # fmt: skip


def _message(total: int, cached: int) -> dict[str, Any]:
    return {
        "id": "m", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": "Yes."}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 1, "cache_read_input_tokens": cached,
                  "cache_creation_input_tokens": total - cached},
    }  # fmt: skip
