"""Answers of a notebook, drawn in the model's queue, and their form in Chat Completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.errors import InvalidValueError
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.serve.local.calls import ChatCall

_BY_LENGTH = "(max_new_tokens)"
"""what the account of an answer says where its number of tokens ended it"""
_OF_TURNS = {"tool_calls", "tool_call_id", "name"}


@dataclass(slots=True)
class Answer:
    """One answer while it is drawn. The pieces' text is not kept here."""

    call: ChatCall
    identity: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    text_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = "stop"

    def of_model(self, model: Model) -> Iterator[str]:
        """Pieces of an answer to messages alone: their whole prompt is prefilled."""
        notebook = Notebook.from_messages(model, self.call.messages)
        notebook.prefill()
        yield from self._drawn(notebook)

    def of_notebook(self, notebook: Notebook) -> Iterator[str]:
        """Pieces of an answer to messages behind a notebook. Afterwards the notebook is unchanged."""
        self.cached_tokens = len(notebook)
        mark = notebook.mark()
        try:
            for message in self.call.messages:
                _add(notebook, message)
            yield from self._drawn(notebook)
        finally:
            notebook.rollback(mark)

    def whole(self, text: str) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A part of the answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last(self) -> dict[str, Any]:
        """The part with the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of the context that was answered, those of them that a notebook had cached, and of the answer's text."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.text_tokens,
            "total_tokens": self.prompt_tokens + self.text_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _drawn(self, notebook: Notebook) -> Iterator[str]:
        self.prompt_tokens = len(notebook)
        said: list[str] = []
        for piece in notebook.generate(**self.call.sampling):
            said.append(piece)
            yield piece
        tokenizer = notebook.model.tokenizer
        self.text_tokens = len(tokenizer("".join(said), add_special_tokens=False)["input_ids"])
        self.finish_reason = "length" if _BY_LENGTH in notebook.last_account.why else "stop"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.call.model}


def _add(notebook: Notebook, message: Mapping[str, Any]) -> None:
    extra = {name: value for name, value in message.items() if name not in ("role", "content") and value}
    if unknown := extra.keys() - _OF_TURNS:
        raise InvalidValueError(f"a message to a notebook has no {min(unknown)!r:.60}: leave it out")
    notebook.add(message["role"], message.get("content"), **extra)
