"""Attention heads on the path from a field to a decision: the effect of each alone, and the first of a ranking."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.experiment import Row
from programmable_kv.lab.experiments.pair import Pair, appended_last
from programmable_kv.lab.experiments.written import TAIL, Part, Text
from programmable_kv.lab.statistics.ranks import spearman
from programmable_kv.lab.tools.copies import Rewritten, rewritten_in_copies
from programmable_kv.lab.tools.head_outputs import Head, head_outputs, head_slopes, heads_from
from programmable_kv.lab.tools.readouts import split_in_half
from programmable_kv.lab.tools.together import Probe, probed


def all_heads(pair: Pair) -> list[Head]:
    """Every (layer, query head) of the model."""
    heads = int(pair.engine.model.config.get_text_config(decoder=True).num_attention_heads)
    return [(layer, head) for layer in range(len(pair.old)) for head in range(heads)]


def note_sets(pair: Pair) -> dict[str, tuple[int, ...]]:
    """Three choices of the slots that count as notes, each larger than the one before."""
    text = pair.text
    both = text.of(Text.OLD_RULE, Text.NEW_RULE)
    return {
        "actions": tuple(slot for slot in both if text.parts[slot] is Part.ACTION),
        "both_rules": both,
        "rules_and_tail": tuple(sorted((*both, *text.of(Text.OTHER_RULE, *TAIL)))),
    }


def all_but(pair: Pair, slots: Sequence[int]) -> tuple[int, ...]:
    """The field's slots, and every later slot that is not one of these."""
    return (*pair.text.field.range, *(slot for slot in pair.text.later if slot not in set(slots)))


def read_by(pair: Pair, notes: Sequence[int], heads: Sequence[Head]) -> Probe:
    """The deciding row reads the new context's notes in these heads, and nothing else of that context."""
    return Probe(tuple(notes), places=tuple(heads))


def read_elsewhere(pair: Pair, notes: Sequence[int], heads: Sequence[Head]) -> Probe:
    """The deciding row reads all of the new context but the notes in these heads: all paths but those through them."""
    others = tuple(head for head in all_heads(pair) if head not in set(heads))
    return Probe(all_but(pair, notes), also=(Probe(tuple(notes), places=others),))


class Writing:
    """Recomputes the notes' rows in one context, with some heads' outputs taken from the other context."""

    def __init__(self, pair: Pair, notes: Sequence[int], *, noising: bool = False) -> None:
        self.pair, self.notes = pair, tuple(sorted(notes))
        self.here, donor = (pair.fresh, pair.old) if noising else (pair.old, pair.fresh)
        self.outputs = head_outputs(pair.engine, donor, _rows_of(pair, self.notes), self.notes)

    def gaps(self, several: Sequence[Rewritten]) -> list[float]:
        """What `gap` gives for each of several sets of heads, or `read` if a set has readers, all in one forward."""
        rows = _rows_of(self.pair, self.notes)
        logits = rewritten_in_copies(self.pair.engine, self.here, rows, self.outputs, several)
        return [float(each) for each in self.pair.gap_in(logits)]

    def gap(self, heads: Sequence[Head]) -> float:
        """The gap if these heads write the other context's notes. The contexts are unchanged."""
        engine = self.pair.engine
        with heads_from(engine, self.here, self.outputs, heads, self.notes):
            return float(self.pair.gap_in(engine.compute(self.here, _rows_of(self.pair, self.notes))[-1]))

    def read(self, heads: Sequence[Head], readers: Sequence[Head]) -> float:
        """`gap`, but the deciding row reads the rewritten notes in some heads only, the earlier ones in the rest."""
        pair, written = self.pair, self.here.fork()
        ids = tuple(pair.text.ids[slot] for slot in self.notes)
        with heads_from(pair.engine, written, self.outputs, heads, self.notes):
            pair.engine.compute(written, Rows(ids, self.notes, self.notes), logits=0)
            probe = Probe(self.notes, places=tuple(readers))
            return float(pair.gap_in(probed(pair.engine, self.here, pair.token, [probe], written)[0]))


def writing_effects(pair: Pair, notes: Sequence[int]) -> list[float]:
    """Estimate what each head's writing of the notes does to the gap: its change times the mean slope of both contexts.

    The exact effects would take a forward for each head.
    """
    slots = tuple(sorted(notes))
    outputs, slopes = [], []
    for buffer in (pair.old, pair.fresh):
        outputs.append(head_outputs(pair.engine, buffer, _rows_of(pair, slots), slots))
        appended, rows = appended_last(pair, buffer, slots)
        slopes.append(head_slopes(pair.engine, appended, rows, rows.slots[:-1], pair.gap_in))
    estimated = (outputs[1] - outputs[0]) * (slopes[0] + slopes[1]) / 2
    by_head: list[float] = estimated.sum(dim=(1, 3)).flatten().tolist()
    return by_head


def _rows_of(pair: Pair, slots: Sequence[int]) -> Rows:
    """The rows of these slots, and the row that decides."""
    whole = (*slots, pair.text.last)
    return Rows(tuple(pair.text.ids[slot] for slot in whole), whole, whole)


def strongest(effects: Sequence[Sequence[float]], heads: Sequence[Head], count: int) -> tuple[Head, ...]:
    """The heads with the largest mean effect of either sign; of equals (all, if nothing was ranked) the later first."""
    means = [fmean(each) for each in zip(*effects, strict=True)] or [0.0] * len(heads)
    order = sorted(range(len(heads)), key=lambda index: (-abs(means[index]), -index))
    return tuple(heads[index] for index in order[:count])


def stability(rows: Sequence[Row], part: str, heads: Sequence[Head], count: int) -> dict[str, float | None]:
    """How well two halves of the ranking policies agree on heads: common ones in the first `count`, and rank order."""
    halves = [[rows[index][part] for index in half] for half in split_in_half([row["domain"] for row in rows])]
    if not all(halves):
        return {"shared": None, "ranks": None}
    first, second = (set(strongest(half, heads, count)) for half in halves)
    means = [[abs(fmean(each)) for each in zip(*half, strict=True)] for half in halves]
    return {"shared": len(first & second) / count, "ranks": spearman(*means)}


def depth(effects: Sequence[Sequence[float]], heads: Sequence[Head], chosen: Sequence[Head]) -> float | None:
    """The mean depth of the chosen heads, from 0 (the first layer) to 1, weighted by their mean effects."""
    if not effects:
        return None
    means = {head: abs(fmean(each)) for head, each in zip(heads, zip(*effects, strict=True), strict=True)}
    whole, last = sum(means[head] for head in chosen), max(layer for layer, _ in heads)
    return sum(means[head] * head[0] for head in chosen) / whole / last if whole and last else None
