"""Both contexts of a change, by the names of their rows.

Decisions are asked for first and computed later, together with all others (`SharedRows`). What two texts have in common
is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from programmable_kv.lab.experiments.pair import Pair, Texts
from programmable_kv.lab.tools.readouts import Scale
from programmable_kv.lab.tools.shared_rows import NOTHING, SharedRows


@dataclass(frozen=True, slots=True, eq=False)
class NamedPair:
    """The rows of two texts. Made by `named_pair`."""

    texts: Texts
    shared: SharedRows
    old: tuple[int, ...]
    """Names by slot, including the row that decides."""
    fresh: tuple[int, ...]

    def patched(self, slots: Sequence[int]) -> int:
        """The row that decides if it reads the new context's rows in these slots, and the old one's in all others."""
        chosen, sees, last = set(slots), NOTHING, self.texts.text.last
        for slot in range(last):
            sees = self.shared.longer(sees, (self.fresh if slot in chosen else self.old)[slot])
        return self.asked(self.shared.name(self.texts.token, last, sees))

    def recomputed(self, slots: Sequence[int], names: Sequence[int] | None = None) -> int:
        """The row that decides after these slots are recomputed with the new value.

        All other rows are those of the old context (or of another one, given by the names of its rows).
        """
        again, standing = {*slots, self.texts.text.last}, self.old if names is None else names
        stays = {slot: name for slot, name in enumerate(standing) if slot not in again}
        return self.asked(self.shared.context(self.texts.new_text.ids, stays)[-1])

    def asked(self, name: int) -> int:
        """Ask for a row's logits in the next computation. Returns the row."""
        self.shared.logits(name)
        return name

    def logits(self, name: int) -> torch.Tensor:
        """The logits [V] of a row that was asked for before all rows were computed."""
        found = self.shared.logits(name)
        assert found is not None, "it was asked for before the rows were computed"
        return found

    def gap(self, name: int) -> float:
        """The gap of a row's logits, in nats."""
        return float(self.texts.gap_in(self.logits(name)))

    def decision(self, name: int) -> dict[str, Any]:
        """The gap, and the action that is chosen."""
        return {"gap": round(self.gap(name), 4), "choice": self.texts.decides(self.logits(name))}

    @property
    def scale(self) -> Scale:
        """The gaps of both contexts, once their rows are computed."""
        return Scale(self.gap(self.old[-1]), self.gap(self.fresh[-1]))


def known_of(pair: Pair) -> SharedRows:
    """Shared rows of this pair's model that already contain both contexts."""
    shared = SharedRows(pair.engine)
    for text, buffer in ((pair.old_text, pair.old), (pair.new_text, pair.fresh)):
        shared.add(text.ids, buffer)
    return shared


def named_pair(texts: Texts, shared: SharedRows) -> NamedPair:
    """Both contexts by the names of their rows. Asks for the logits of the rows that decide."""
    old, fresh = (shared.context(text.ids) for text in (texts.old_text, texts.new_text))
    for names in (old, fresh):
        shared.logits(names[-1])
    return NamedPair(texts, shared, old, fresh)
