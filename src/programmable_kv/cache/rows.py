"""Rows: tokens to compute, each with its slot and its position, and how they are divided into forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import lt

import torch

from programmable_kv.cache.frequencies import FrequencyRule, first_reaching
from programmable_kv.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens to compute: their ids, slots and positions. Slots and positions ascend.

    Raises:
        InvalidArgumentError: `ids`, `slots` and `positions` differ in length, or the slots do not ascend.
    """

    ids: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.slots) == len(self.positions):
            raise InvalidArgumentError(
                f"ids, slots and positions must have one entry for each row, got {len(self.ids)}, {len(self.slots)} and "
                f"{len(self.positions)}"
            )
        if self.slots and not all(map(lt, self.slots, self.slots[1:])):
            raise InvalidArgumentError(f"slots must ascend, got {self.slots[:8]}...")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def appended(cls, ids: Sequence[int], slot: int, position: int) -> Rows:
        count = len(ids)
        return cls(tuple(ids), tuple(range(slot, slot + count)), tuple(range(position, position + count)))

    def followed_by(self, other: Rows) -> Rows:
        """These rows and then the other ones, as one set of rows."""
        return Rows(self.ids + other.ids, self.slots + other.slots, self.positions + other.positions)

    def part(self, start: int, stop: int) -> Rows:
        """The rows with indices [start, stop)."""
        return Rows(self.ids[start:stop], self.slots[start:stop], self.positions[start:stop])

    def token_ids(self, vocabulary: int) -> torch.Tensor:
        """The ids, [T] on the CPU.

        Raises:
            InvalidArgumentError: an id is not a whole number, or is not in a vocabulary of that size.
        """
        try:
            ids = torch.tensor(self.ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(f"token ids must be whole numbers; got {self.ids[:3]!r}... ({error})") from error
        if ids.numel() and (ids.dtype != torch.long or int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
            raise InvalidArgumentError(
                f"token ids of this model must be whole numbers from 0 to {vocabulary - 1}; got numbers from "
                f"{ids.min()} to {ids.max()}. Were they made by another model's tokenizer?"
            )
        return ids

    def forwards(self, rules: Sequence[FrequencyRule], logits: int, chunk: int) -> Iterator[tuple[int, int]]:
        """Divide the rows into forwards of equal size, at most `chunk` rows if possible; yields [start, stop) of each.

        The last forward contains the last `logits` rows. All forwards must use the frequency tables that the last row
        needs, so the first one extends at least to the position where these tables begin. No rows give one empty
        forward.
        """
        count = len(self)
        size = -(-count // max(1, -(-count // chunk)))
        last = count - max(1, logits)
        start = 0
        while start < count or not count:
            fewest = first_reaching(rules, self.positions[start:]) if rules else 1
            stop = start + max(size, fewest)
            if last < stop < count:
                stop = last if last - start >= fewest else count
            yield start, min(stop, count)
            start = stop
            if not count:
                return
