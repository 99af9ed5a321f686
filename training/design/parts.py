"""A sequence of tokens in parts, which records the contents of a cache over time.

Each token has a part, a position, and the index from which it is dead. An edit appends the field's new value and the
field's readers to the sequence, at the same positions as before. From there on, the earlier copies are dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.design.chat_format import CHATML, ChatFormat
from training.design.words import vocabulary_words

PLAIN, TURNS = 0, 1
"""the two parts of every sequence: plain text of the system message, and all later turns"""
NEVER = 2**30
"""`dead` index of a token that never dies"""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The columns [n] of one sequence of n tokens, and the table of its p parts."""

    family: str
    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    part: NDArray[np.int32]
    dead: NDArray[np.int32]
    """the index from which no token reads this one"""
    learned: NDArray[np.bool_]
    reads: NDArray[np.bool_]
    """[p, p], whether the row's part may read the column's part"""

    def __len__(self) -> int:
        return len(self.ids)

    def last_answer_only(self) -> TokenSequence:
        """Return the same sequence with only the last run of learned tokens marked as learned."""
        (at,) = np.nonzero(self.learned)
        gaps = np.nonzero(np.diff(at) > 1)[0]
        learned = np.zeros_like(self.learned)
        learned[at[gaps[-1] + 1 if len(gaps) else 0 :]] = True
        return TokenSequence(self.family, self.ids, self.positions, self.part, self.dead, learned, self.reads)


class Encoding:
    """A tokenizer with a cache of its results, because the same lines occur often; and its model's chat format."""

    def __init__(self, tokenizer: Any, chat: ChatFormat = CHATML) -> None:
        self._tokenizer = tokenizer
        self.chat = chat
        self.words = vocabulary_words(tokenizer)
        """words of which training makes names; None: those of the grammar"""
        self._remembered = lru_cache(maxsize=20_000)(self._with_offsets)

    def __reduce__(self) -> tuple[type[Encoding], tuple[Any, ChatFormat]]:
        return Encoding, (self._tokenizer, self.chat)  # so that worker processes that are not forked can unpickle it

    def ids(self, text: str) -> tuple[int, ...]:
        return self.with_offsets(text)[0]

    def with_offsets(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Return token ids, and for each token the half-open range of its characters."""
        return self._remembered(text) if len(text) < 400 else self._with_offsets(text)

    def _with_offsets(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return tuple(encoded["input_ids"]), tuple(map(tuple, encoded["offset_mapping"]))


class Writer:
    """Writes a sequence from left to right. A part reads itself and the parts that are given when it is created."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, bool]] = []
        self._dead: list[int] = []
        self._reads: list[set[int]] = [{PLAIN}, set()]
        self.position = 0
        """position of the next token, unless another one is given"""

    def __len__(self) -> int:
        return len(self._rows)

    def new_part(self, reads: Iterable[int] = ()) -> int:
        self._reads.append({len(self._reads), *reads})
        return len(self._reads) - 1

    def add(self, ids: Sequence[int], part: int, *, learned: bool = False, at: int | None = None) -> range:
        """Write tokens at the next position, or at position `at` to replace an earlier copy. Return their indices."""
        first, start = len(self._rows), self.position if at is None else at
        self._rows += [(token, start + i, part, learned) for i, token in enumerate(ids)]
        self._dead += [NEVER] * len(ids)
        self.position = max(self.position, start + len(ids))
        return range(first, len(self._rows))

    def kill(self, indices: Iterable[int]) -> None:
        """Mark tokens as dead: no token that is written from now on reads them."""
        for index in indices:
            self._dead[index] = len(self._rows)

    def skip_to(self, position: int) -> None:
        """Leave a gap: the next token gets this position."""
        assert position >= self.position
        self.position = position

    def finish(self, family: str) -> TokenSequence:
        reads = np.zeros((len(self._reads), len(self._reads)), dtype=bool)
        for part, read in enumerate(self._reads):
            reads[part, sorted(read)] = True
        reads[TURNS] = True
        ids, positions, part_of, learned = zip(*self._rows, strict=True)
        return TokenSequence(
            family, _column(ids), _column(positions), _column(part_of), _column(self._dead),
            np.asarray(learned, dtype=bool), reads,
        )  # fmt: skip


def _column(values: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(values, dtype=np.int32)
