"""A sequence of tokens in parts: what a cache holds over time, written down once.

Each token has a part (who it is), a position, and the index from which it is dead. An edit writes the field's new value and its
readers again, later in the sequence but at the same positions; the first copies are dead from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.design.chat_format import CHATML, ChatFormat

PLAIN, TURNS = 0, 1
"""the two parts that every sequence has: plain text of the system message, and all that is said later"""
NEVER = 2**30
"""the index from which a living token is dead"""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Columns of one sequence of n tokens in p parts."""

    family: str
    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    part: NDArray[np.int32]
    dead: NDArray[np.int32]
    """the index from which no token reads this one"""
    learned: NDArray[np.bool_]
    reads: NDArray[np.bool_]
    """[p, p]: whether the part of the row may read the part of the column"""

    def __len__(self) -> int:
        return len(self.ids)

    def last_answer_only(self) -> TokenSequence:
        """The same sequence, where only the last run of learned tokens is learned."""
        (at,) = np.nonzero(self.learned)
        gaps = np.nonzero(np.diff(at) > 1)[0]
        learned = np.zeros_like(self.learned)
        learned[at[gaps[-1] + 1 if len(gaps) else 0 :]] = True
        return TokenSequence(self.family, self.ids, self.positions, self.part, self.dead, learned, self.reads)


class Encoding:
    """A tokenizer whose results are remembered: the same lines come again and again. And how its model's chats are written."""

    def __init__(self, tokenizer: Any, chat: ChatFormat = CHATML) -> None:
        self._tokenizer = tokenizer
        self.chat = chat
        self._remembered = lru_cache(maxsize=20_000)(self._with_offsets)

    def __reduce__(self) -> tuple[type[Encoding], tuple[Any, ChatFormat]]:
        return Encoding, (self._tokenizer, self.chat)  # for worker processes that are not forked

    def ids(self, text: str) -> tuple[int, ...]:
        return self.with_offsets(text)[0]

    def with_offsets(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Token ids, and for each its first character and the one after its last."""
        return self._remembered(text) if len(text) < 400 else self._with_offsets(text)

    def _with_offsets(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return tuple(encoded["input_ids"]), tuple(map(tuple, encoded["offset_mapping"]))


class Writer:
    """Writes a sequence from left to right. A part reads itself; what else it reads is said when it is made."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, bool]] = []
        self._dead: list[int] = []
        self._reads: list[set[int]] = [{PLAIN}, set()]
        self.position = 0
        """where the next token stands, unless another place is given"""

    def __len__(self) -> int:
        return len(self._rows)

    def new_part(self, reads: Iterable[int] = ()) -> int:
        self._reads.append({len(self._reads), *reads})
        return len(self._reads) - 1

    def add(self, ids: Sequence[int], part: int, *, learned: bool = False, at: int | None = None) -> range:
        """Write tokens at the next position, or `at` one where a copy stands already. Returns their indices."""
        first, start = len(self._rows), self.position if at is None else at
        self._rows += [(token, start + i, part, learned) for i, token in enumerate(ids)]
        self._dead += [NEVER] * len(ids)
        self.position = max(self.position, start + len(ids))
        return range(first, len(self._rows))

    def kill(self, indices: Iterable[int]) -> None:
        """No token that is written from now on reads these."""
        for index in indices:
            self._dead[index] = len(self._rows)

    def skip_to(self, position: int) -> None:
        """Leave a hole: the next token stands at this position."""
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
