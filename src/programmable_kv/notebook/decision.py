"""Decisions: which of several options the model is likeliest to answer, by the log-probability of the whole string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from programmable_kv.account import Account
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidOptionsError

_TAIL_CHARACTERS = 24


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen option, its probability, and what the decision cost.

    `log_probabilities` are those of each option's whole token string; `probabilities` are normalised over the options.
    `account` is what it took until the answer's first token could be read, an edit in the same call included;
    `scoring` is what came on top: a thought, and the later tokens of the options.
    """

    choice: str
    probabilities: dict[str, float]
    log_probabilities: dict[str, float]
    account: Account
    scoring: Account
    thought: str = ""

    def __str__(self) -> str:
        likely = sorted(self.probabilities.items(), key=lambda each: -each[1])
        thought = f", after the thought {self.thought!r}" if self.thought else ""
        return (
            f"{self.choice} ({', '.join(f'{option} {probability:.3f}' for option, probability in likely)}){thought}; "
            f"{self.account.tokens_computed} tokens computed, {self.ttft_ms:.0f} ms"
        )

    @property
    def ttft_ms(self) -> float:
        """Time to first token: milliseconds until the logits of the answer's first token were computed."""
        return 1e3 * self.account.seconds

    def gap(self, new: str, old: str) -> float:
        """The log-probability of option `new` minus that of option `old`, in nats."""
        return self.log_probabilities[new] - self.log_probabilities[old]


def option_ids(tokenizer: Any, prompt_end: str, options: Sequence[str], end_id: int | None) -> list[list[int]]:
    """The token ids of each option, in the form that fits the end of the prompt.

    After white space (a chat template's header) an option is unchanged; after a word or colon it takes a space. Its
    tokens are those that the prompt's last characters and the option give together, so that a tokenizer's word
    marker is right. Where one option's tokens begin another's, all options are closed with the end-of-turn token:
    without it the shorter one could never lose.

    Raises:
        InvalidOptionsError: there are fewer than two options; two options or their tokens are equal; an option is not a
            string or has no tokens; or one begins another and `end_id` is None.
    """
    if isinstance(options, str):
        raise InvalidOptionsError(f"options are a list of strings, got a single string {options!r}")
    if not all(isinstance(option, str) for option in options):
        raise InvalidOptionsError(f"options are strings, got {list(options)}")
    if len(options) < 2 or len(set(options)) != len(options) or not all(option.strip() for option in options):
        raise InvalidOptionsError(f"a decision needs at least two different, non-empty options; got {list(options)}")
    tail = prompt_end[-_TAIL_CHARACTERS:]
    space = "" if not tail or tail[-1].isspace() else " "
    tail_ids = tokenizer.encode(tail, add_special_tokens=False)
    found = []
    for option in options:
        joined = tokenizer.encode(tail + space + option, add_special_tokens=False)
        if joined[: len(tail_ids)] == tail_ids:
            found.append(joined[len(tail_ids) :])
        else:
            found.append(tokenizer.encode(space + option, add_special_tokens=False))
    if not all(found):
        raise InvalidOptionsError(f"an option has no tokens: {list(options)}")
    starts_another = any(a != b and b[: len(a)] == a for a in found for b in found)
    if len({tuple(ids) for ids in found}) != len(found):
        raise InvalidOptionsError(f"two options have the same tokens: {list(options)}")
    if starts_another:
        if end_id is None:
            raise InvalidOptionsError(
                f"one option is the beginning of another ({list(options)}), and this tokenizer has no end token to tell "
                "them apart. Rephrase them."
            )
        found = [[*ids, end_id] for ids in found]
    return found


def best_of(options: Sequence[str], scores: Sequence[float]) -> str:
    """The option with the highest score; the first one if several are equal."""
    return options[max(range(len(options)), key=lambda index: scores[index])]


@torch.no_grad()
def likeliest(engine: Engine, buffer: KVBuffer, first_logits: torch.Tensor, options: Sequence[Sequence[int]]) -> int:
    """The index of the option that `score` would score highest.

    A string is never likelier than its first token. So an option is skipped if its first token is less likely than the
    whole string of an option that was scored before. Arguments as in `score`.
    """
    first = torch.log_softmax(first_logits[-1].cpu().double(), dim=-1)
    beginning: dict[int, list[int]] = {}
    for index, ids in enumerate(options):
        beginning.setdefault(ids[0], []).append(index)
    found: dict[int, float] = {}
    for token in sorted(beginning, key=lambda token: -float(first[token])):
        if found and float(first[token]) < max(found.values()):
            break
        alike = beginning[token]
        found |= zip(alike, score(engine, buffer, first_logits, [options[i] for i in alike]), strict=True)
    return min(found, key=lambda index: (-found[index], index))


@torch.no_grad()
def score(
    engine: Engine, buffer: KVBuffer, first_logits: torch.Tensor, options: Sequence[Sequence[int]]
) -> list[float]:
    """The log-probability of each option's tokens, as a continuation of the buffer. The buffer is unchanged.

    `first_logits`: [1, vocabulary], of the row that the first token follows. Options with a shared beginning share its
    computation: it is computed once, and the buffer is truncated back to it.
    """
    length = buffer.length
    cached: list[int] = []
    rows: list[torch.Tensor] = [torch.log_softmax(first_logits[-1].cpu().double(), dim=-1)]
    scores = [0.0] * len(options)
    for index in sorted(range(len(options)), key=lambda i: list(options[i])):
        ids = list(options[index])
        shared = 0
        while shared < min(len(cached), len(ids) - 1) and cached[shared] == ids[shared]:
            shared += 1
        buffer.truncate(length + shared)
        del rows[shared + 1 :]
        new = ids[shared:-1]
        if new:
            logits = engine.append(buffer, new, logits=len(new))
            rows += list(torch.log_softmax(logits.cpu().double(), dim=-1))
        cached = ids[:-1]
        scores[index] = sum(float(rows[i][token]) for i, token in enumerate(ids))
    buffer.truncate(length)
    return scores
