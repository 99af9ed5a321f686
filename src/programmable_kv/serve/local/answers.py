"""Generates the text of answers. Each protocol's module writes it in the protocol's form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from programmable_kv.errors import InvalidValueError
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.notebook.stopping import StopStrings
from programmable_kv.serve.local.asks import Ask
from programmable_kv.serve.local.tools import CALL, ToolCall, check_tools, split

if TYPE_CHECKING:
    import torch

_BY_LENGTH = "(max_new_tokens)"
"""Part of the account's `why` if an answer ended at its token limit."""
_OF_TURNS = {"tool_calls", "tool_call_id", "name"}
_LEAST = -9999.0
"""The log-probability sent in place of minus infinity, which JSON does not have."""


class End(StrEnum):
    """The reason why an answer ended."""

    MODEL = "model"
    """The model ended its turn."""
    LENGTH = "length"
    """The answer reached its token limit."""
    STOP = "stop"
    """The model generated a stop string."""
    CALLS = "calls"
    """The model called tools."""


@dataclass(frozen=True, slots=True)
class TokenShare:
    """A token and its log-probability."""

    text: str
    log_probability: float

    @property
    def utf8(self) -> list[int] | None:
        """The token's bytes; None if the token is only a part of a character."""
        return None if "\ufffd" in self.text else list(self.text.encode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Drawn(TokenShare):
    """A token of an answer, with the likeliest tokens at its place if the request asks for them."""

    likeliest: tuple[TokenShare, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer's text, with its tokens if the request asks for them."""

    text: str
    tokens: tuple[Drawn, ...] = ()


@dataclass(slots=True)
class Answer:
    """One answer while it is generated."""

    ask: Ask
    created: int = field(default_factory=lambda: int(time.time()))
    text_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    end: End = End.MODEL
    stop: str | None = None
    """The stop string that ended the answer."""
    calls: list[ToolCall] = field(default_factory=list)

    def of_model(self, model: Model) -> Iterator[Piece]:
        """Yield the pieces of an answer without a notebook. The whole prompt is prefilled."""
        ask = self.ask
        if ask.raw is not None:
            notebook = Notebook(model).text(ask.raw)
        else:
            tools = ask.tools if ask.most_calls != 0 else ()
            notebook = Notebook.from_messages(model, ask.messages, tools=tools or None)
            if tools:
                check_tools(model, tools)
        notebook.prefill()
        yield from self._read(notebook)

    def of_notebook(self, notebook: Notebook) -> Iterator[Piece]:
        """Yield the pieces of an answer to messages appended to a notebook. Afterwards the notebook is unchanged."""
        self.cached_tokens = len(notebook)
        mark = notebook.mark()
        try:
            for message in self.ask.messages:
                _add(notebook, message)
            yield from self._read(notebook)
        finally:
            notebook.rollback(mark)

    def _read(self, notebook: Notebook) -> Iterator[Piece]:
        """Yield the pieces that a client sees as text. Tool calls are removed from the text and collected in `calls`.

        If no tool may be called, everything that the model says is text.
        """
        most = self.ask.most_calls
        if most == 0 or not notebook.prompt.template.tools:
            yield from self._drawn(notebook)
            return
        whole, shown = "", ""
        held: list[Drawn] = []
        gate = StopStrings([CALL])
        for piece in self._drawn(notebook):
            whole += piece.text
            held += piece.tokens
            passed = gate.passed(piece.text)
            shown += passed
            if passed:
                yield Piece(passed, tuple(held))
                held.clear()
        said, calls = split(whole)
        self.calls = calls[:most]
        if self.calls:
            self.end = End.CALLS
        rest = said[len(shown) :] if said.startswith(shown) else ""
        if rest:
            yield Piece(rest, tuple(held))

    def _drawn(self, notebook: Notebook) -> Iterator[Piece]:
        self.prompt_tokens = len(notebook)
        said: list[str] = []
        tokens: list[Drawn] = []
        tokenizer, likeliest = notebook.model.tokenizer, self.ask.likeliest

        def watch(token: int, shares: torch.Tensor) -> None:
            best = shares.topk(likeliest) if likeliest else None
            among = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best is not None else ()
            others = tuple(TokenShare(tokenizer.decode([at]), max(_LEAST, share)) for at, share in among)
            tokens.append(Drawn(tokenizer.decode([token]), max(_LEAST, float(shares[token])), others))

        for text in notebook.generate(**self.ask.sampling, watch=watch if likeliest is not None else None):
            said.append(text)
            yield Piece(text, tuple(tokens))
            tokens.clear()
        self.text_tokens = len(tokenizer("".join(said), add_special_tokens=False)["input_ids"])
        self._ended(notebook.last_account.why, self.ask.sampling["stop"])

    def _ended(self, why: str, stops: Sequence[str]) -> None:
        self.stop = next((each for each in stops if f"before {each!r} (stop)" in why), None)
        if self.stop is not None:
            self.end = End.STOP
        elif _BY_LENGTH in why:
            self.end = End.LENGTH


def _add(notebook: Notebook, message: Mapping[str, Any]) -> None:
    extra = {name: value for name, value in message.items() if name not in ("role", "content") and value}
    if unknown := extra.keys() - _OF_TURNS:
        raise InvalidValueError(f"a message to a notebook must not have {min(unknown)!r:.60}: leave it out")
    notebook.add(message["role"], message.get("content"), **extra)
