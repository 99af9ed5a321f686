"""Completions: `/v1/completions`. The prompt is raw text, which may contain special tokens."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from programmable_kv.serve.checks import refuse
from programmable_kv.serve.local.answers import Answer, Drawn, Piece
from programmable_kv.serve.local.asks import (
    Ask,
    at_most,
    check_known,
    count,
    flag,
    limit_of,
    model_of,
    sampling_of,
    stops_of,
)
from programmable_kv.serve.local.chat import FINISH, usage_of
from programmable_kv.serve.local.forms import event, text_of, tokens_of

_READ = (
    "model",
    "prompt",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "max_tokens",
    "stop",
    "seed",
    "logprobs",
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},),
}  # fmt: skip
_TOKENS = 16
"""The token limit of an answer if the request sets none. The protocol defines this default."""
_MOST_LIKELIEST = 5


class CompletionForm:
    """One request to Completions and its answer."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """
        Raises:
            RefusedError: a part of the body is missing, has the wrong type or is not supported.
            InvalidArgumentError: the token limit is below 1, or the stop strings are invalid.
        """
        check_known(body, _READ, _NEUTRAL, ("user",))
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str) or not prompt:
            refuse("invalid_request", "prompt must be a text of at least one character")
        model = model_of(body)
        if model.startswith("notebook:"):
            refuse("unsupported_parameter", "a notebook is a conversation: use one of the chat protocols")
        options = body.get("stream_options") or {}
        if not isinstance(options, Mapping):
            refuse("invalid_request", "stream_options must be an object")
        shares = body.get("logprobs")
        likeliest = None if shares is None else at_most(count(body, "logprobs", 0), "logprobs", _MOST_LIKELIEST)
        sampling = sampling_of(body, limit_of(body, "max_tokens", default=_TOKENS), stops_of(body, "stop"))
        self.ask = Ask(model, (), sampling, flag(body, "stream"), likeliest=likeliest, raw=prompt)
        self._usage = flag(options, "include_usage")
        self._identity = f"cmpl-{secrets.token_hex(12)}"
        self._shown = 0
        """The number of the answer's characters that were sent."""

    def whole(self, answer: Answer, pieces: Sequence[Piece]) -> Mapping[str, Any]:
        """See `Form`."""
        choice = self._choice(text_of(pieces), tokens_of(pieces), FINISH[answer.end])
        return {**self._head(answer), "choices": [choice], "usage": usage_of(answer)}

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        yield from ()

    def said(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        """See `Form`."""
        yield event({**self._head(answer), "choices": [self._choice(piece.text, piece.tokens, None)]})

    def finish(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        yield event({**self._head(answer), "choices": [self._choice("", (), FINISH[answer.end])]})
        if self._usage:
            yield event({**self._head(answer), "choices": [], "usage": usage_of(answer)})
        yield b"data: [DONE]\n\n"

    def _choice(self, text: str, tokens: Sequence[Drawn], finish: str | None) -> dict[str, Any]:
        shares = None if self.ask.likeliest is None else _shares(tokens, self._shown)
        self._shown += len(text)
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": shares}

    def _head(self, answer: Answer) -> dict[str, Any]:
        return {
            "id": self._identity,
            "object": "text_completion",
            "created": answer.created,
            "model": self.ask.model,
        }


def _shares(tokens: Sequence[Drawn], start: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": [{each.text: each.log_probability for each in token.likeliest} for token in tokens],
        "text_offset": offsets,
    }
