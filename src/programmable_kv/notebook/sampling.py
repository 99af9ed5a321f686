"""How an answer's tokens are drawn. A new parameter is a field of `Sampling` and an argument of `Notebook.generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from programmable_kv.arguments import require, require_count, require_number
from programmable_kv.errors import InvalidArgumentError

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase

Watch = Callable[[int, torch.Tensor], None]
"""called with a drawn token and the log-probabilities [V] from which the model predicted it"""

_ROOM = 512
"""answer tokens that memory is reserved for at first: a `max_new_tokens` of a billion must not reserve as many"""
_COLDEST = 1e-30
"""the temperature below which logits / temperature overflows float32; decoding is greedy there, which is equivalent"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The parameters of `Notebook.generate`, with its names and defaults. transformers' own code applies each of them.

    Raises:
        InvalidArgumentError: a value is of the wrong type or out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int | str, float] | None = None
    stop: Sequence[str] = ()
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        require_count(self.max_new_tokens, "max_new_tokens", least=1)
        require_count(self.seed, "a seed")
        require_number(self.temperature, "a temperature", least=0)
        require_number(self.repetition_penalty, "repetition_penalty", above=0)
        if self.top_k is not None:
            require_count(self.top_k, "top_k", least=1)
        for value, what in ((self.top_p, "top_p"), (self.min_p, "min_p")):
            if value is not None:
                require_number(value, what, above=0, most=1)
        if self.max_seconds is not None:
            require_number(self.max_seconds, "max_seconds", above=0)
        require(self.stop, (list, tuple), "stop is a list of strings")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidArgumentError(f"a stop string is text of at least one character; got {text!r}")
        require(self.logit_bias, (Mapping, type(None)), "logit_bias is a mapping of tokens to numbers")
        for token, bias in (self.logit_bias or {}).items():
            if isinstance(token, str):
                require(token or None, str, "a token of logit_bias is an id, or text of at least one character")
            else:
                require_count(token, "a token id in logit_bias")
            require_number(bias, f"the logit bias of {token!r}")

    def processors(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> LogitsProcessorList:
        """The logits processors, in the order in which transformers' `generate` applies them.

        Args:
            vocabulary: the size of the model's vocabulary, in tokens.

        Raises:
            InvalidArgumentError: `logit_bias` names a token that the model does not have.
        """
        from transformers import LogitsProcessorList
        from transformers.generation import logits_process as rules

        found = LogitsProcessorList()
        if self.logit_bias:
            biases = {self._ids(token, tokenizer, vocabulary): float(it) for token, it in self.logit_bias.items()}
            found.append(rules.SequenceBiasLogitsProcessor([[list(ids), bias] for ids, bias in biases.items()]))
        if self.repetition_penalty != 1:
            found.append(rules.RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature > 0:
            found.append(rules.TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k is not None:
                found.append(rules.TopKLogitsWarper(self.top_k))
            if self.top_p is not None and self.top_p < 1:
                found.append(rules.TopPLogitsWarper(float(self.top_p)))
            if self.min_p is not None:
                found.append(rules.MinPLogitsWarper(float(self.min_p)))
        return found

    @staticmethod
    def _ids(token: int | str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, ...]:
        if isinstance(token, str):
            return tuple(tokenizer.encode(token, add_special_tokens=False))
        if token >= vocabulary:
            raise InvalidArgumentError(f"logit_bias names token {token}, but the model has {vocabulary} tokens")
        return (token,)


class Sampler:
    """Draws an answer's tokens one after the other, and remembers the ids before the next one.

    Args:
        before: the ids of the context and the prompt. A repetition penalty counts them too, as in transformers.
        watch: `tell` calls it with the latest token.
    """

    def __init__(
        self,
        sampling: Sampling,
        before: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        watch: Watch | None = None,
    ) -> None:
        self._watch = watch
        self._latest = torch.empty(0)
        if sampling.temperature < _COLDEST:
            sampling = replace(sampling, temperature=0.0)
        self._greedy = sampling.temperature == 0
        self._processors = sampling.processors(tokenizer, vocabulary)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._ids = torch.empty(1, len(before) + min(sampling.max_new_tokens, _ROOM), dtype=torch.long)
        self._ids[0, : len(before)] = torch.tensor(before, dtype=torch.long)
        self._length = len(before)

    def choose(self, logits: torch.Tensor) -> int:
        """Draw the next token from the logits [V], on the CPU, so that a seed means the same on every machine."""
        scores = logits.float().cpu()[None]
        if self._watch is not None:
            self._latest = torch.log_softmax(scores[0], dim=-1)
        if self._processors:
            scores = self._processors(self._ids[:, : self._length], scores)
        if self._greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(scores[0], dim=-1), 1, generator=self._generator))
        if self._length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids)], dim=1)
        self._ids[0, self._length] = token
        self._length += 1
        return token

    def tell(self, token: int) -> None:
        """Call `watch`, if there is one, with the token drawn last: it is part of the answer."""
        if self._watch is not None:
            self._watch(token, self._latest)
