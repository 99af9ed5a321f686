"""The notes of a pair, the first tokens of both rules' actions, as rows that are recomputed with other activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.heads import note_sets
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.read_by_layer import Items
from programmable_kv.lab.experiments.written import Text, Written
from programmable_kv.lab.tools.copies import Exchanged, computed_in_copies
from programmable_kv.lab.tools.hooks import Change, taken_back
from programmable_kv.lab.tools.sites import Place, Site, changed, recorded


class NoteRows:
    """The notes of a pair."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        actions = note_sets(pair)["actions"]
        self.slots = tuple(slot for slot in actions if slot - 1 not in set(actions))
        self.ids = tuple(pair.text.ids[slot] for slot in self.slots)
        self._own: dict[bool, torch.Tensor] = {}

    @property
    def applies(self) -> dict[str, list[bool]]:
        """Whether each note's rule applies, in the `old` and in the `new` context."""
        old = [self.pair.text.kinds[slot] is Text.OLD_RULE for slot in self.slots]
        return {"old": old, "new": [not each for each in old]}

    def streams(self, buffer: KVBuffer) -> torch.Tensor:
        """The residual stream of the notes' rows before each layer, and after the last one: [L + 1, notes, d]."""
        return self._recorded(buffer, Rows(self.ids, self.slots, self.slots))

    def streams_of(self, text: Written, *, noising: bool = False) -> torch.Tensor:
        """The streams if another text replaces the old context, or with `noising` the new one.

        Recomputes everything from the first token that differs to the last note. The contexts are unchanged.
        """
        here, own = (self.pair.fresh, self.pair.new_text) if noising else (self.pair.old, self.pair.old_text)
        differ = (slot for slot, (a, b) in enumerate(zip(text.ids, own.ids, strict=True)) if a != b)
        slots = tuple(range(min(next(differ, self.slots[0]), self.slots[0]), self.slots[-1] + 1))
        return self._recorded(here, Rows(tuple(text.ids[slot] for slot in slots), slots, slots))

    def _recorded(self, buffer: KVBuffer, rows: Rows) -> torch.Tensor:
        sites = [Site(Place.RESIDUAL, layer) for layer in range(len(buffer) + 1)]
        with recorded(self.pair.engine, buffer, sites, self.slots) as found:
            self.pair.engine.compute(buffer, rows, logits=0)
        return torch.stack([found[site] for site in sites])

    def items(self, old: torch.Tensor, new: torch.Tensor) -> Items:
        """The notes of both contexts as items, by their streams. Label: does the rule apply? Kind: its action."""
        applies = (*self.applies["old"], *self.applies["new"])
        return Items(torch.cat((old, new), dim=1), applies, (*self.pair.actions, *self.pair.actions))

    def gap(self, layer: int, change: Change | None, *, noising: bool = False) -> float:
        """The gap if the notes' rows are recomputed in the old context with their stream changed before a layer.

        With `noising`, in the new context. The contexts are unchanged.
        """
        pair = self.pair
        here = pair.fresh if noising else pair.old
        slots = (*self.slots, pair.text.last)
        rows = Rows((*self.ids, pair.token), slots, slots)
        if change is None:
            with taken_back(here):
                return float(pair.gap_in(pair.engine.compute(here, rows)[-1]))
        with changed(pair.engine, here, Site(Place.RESIDUAL, layer), change, self.slots):
            return float(pair.gap_in(pair.engine.compute(here, rows)[-1]))

    def gaps(self, changes: Sequence[tuple[int, Change]], *, noising: bool = False) -> list[float]:
        """The gap under each of several changes (layer, change), as `gap` gives them, all in one forward."""
        pair = self.pair
        here = pair.fresh if noising else pair.old
        if not changes:
            return []
        if noising not in self._own:
            self._own[noising] = self.streams(here)
        own, every = self._own[noising], torch.arange(len(self.slots))
        exchanges = [Exchanged(layer, change(own[layer], every)) for layer, change in changes]
        slots = (*self.slots, pair.text.last)
        found = computed_in_copies(pair.engine, here, Rows((*self.ids, pair.token), slots, slots), exchanges)
        return [float(each) for each in pair.gap_in(found)]


def shifted(direction: torch.Tensor, sizes: Sequence[float]) -> Change:
    """A change that moves each row along a direction [d] by its own size."""
    steps = torch.tensor(list(sizes))

    def change(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return rows + steps.to(rows)[which][:, None] * direction.to(rows)

    return change
