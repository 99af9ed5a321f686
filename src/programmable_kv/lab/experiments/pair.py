"""Two prefilled contexts that differ only in one field's value, and what a change in one of them does.

Every slot has the same position in both, so keys and values of one can be put into the other unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine, Rows
from programmable_kv.lab.experiments.cases import Case
from programmable_kv.lab.experiments.written import Written, written
from programmable_kv.lab.tools.branches import Branch, branching
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.kv import rows_from
from programmable_kv.lab.tools.readouts import Scale, gap
from programmable_kv.lab.tools.together import Probe, probed
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import option_ids


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """A context with the old value, the same with the new one, and how logits after them are read as a decision."""

    case: Case
    change: tuple[str, str]
    """The old and the new value."""
    model: Model
    old_text: Written
    new_text: Written
    first_tokens: Mapping[str, int]
    """For each action, the token that tells it from the others."""

    @property
    def engine(self) -> Engine:
        return self.model.engine

    @property
    def text(self) -> Written:
        """What both contexts share: the kind of every slot, and all tokens but the field's."""
        return self.old_text

    @property
    def actions(self) -> tuple[str, str]:
        """The actions of the old and the new value."""
        old, new = self.change
        return self.case.gate.actions[old], self.case.gate.actions[new]

    @property
    def token(self) -> int:
        """The token whose row decides."""
        return self.text.ids[-1]

    def gap_in(self, logits: torch.Tensor) -> torch.Tensor:
        """How much likelier the new value's action is than the old value's, in nats, from logits [..., V]."""
        old, new = self.actions
        return gap(logits, self.first_tokens[new], self.first_tokens[old])

    def decides(self, logits: torch.Tensor) -> str:
        """The action that logits [V] choose."""
        return max(self.first_tokens, key=lambda action: float(logits[self.first_tokens[action]]))


@dataclass(frozen=True, slots=True, eq=False)
class Pair(Texts):
    """Both contexts, cached without the last row, and the gaps of their decisions."""

    old: KVBuffer
    fresh: KVBuffer
    """The context with the new value."""
    scale: Scale

    def probe(self, probes: Sequence[Probe], *, noising: bool = False) -> torch.Tensor:
        """The logits of the last row under each probe, [probes, V]. Probes put the new context's rows into the old one.

        With `noising`, they put the old context's rows into the new one.
        """
        here, there = (self.fresh, self.old) if noising else (self.old, self.fresh)
        return probed(self.engine, here, self.token, probes, there)

    def gaps(self, probes: Sequence[Probe], *, noising: bool = False) -> list[float]:
        """The gap under each probe."""
        return [float(each) for each in self.gap_in(self.probe(probes, noising=noising))] if probes else []

    def recomputed(self, slots: Sequence[int]) -> float:
        """The gap after an edit of the old context: these slots recomputed with the new value, all others left stale.

        It takes one forward, as an edit does: a recomputed row reads those recomputed before it. The contexts are
        unchanged.
        """
        with taken_back(self.old):
            chosen = (*sorted(slots), self.text.last)
            rows = Rows(tuple(self.new_text.ids[slot] for slot in chosen), chosen, chosen)
            return float(self.gap_in(self.engine.compute(self.old, rows)[-1]))

    def each_recomputed(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """What `recomputed` gives for each set of slots, computed as branches of a few forwards."""
        several = []
        for slots in sets:
            again = tuple(sorted(slots))
            chosen = (*again, self.text.last)
            several.append(Branch(tuple(self.new_text.ids[slot] for slot in chosen), chosen, absent=again))
        with branching(self.engine, self.old) as branches:
            return self.gap_in(branches.last(several)).tolist() if several else []


def pair_of(model: Model, case: Case, *, system: str | None = None, asks_value: bool = False) -> Pair | str:
    """The two contexts of `texts_of`, prefilled; or the reason why there are none."""
    found = texts_of(model, case, system=system, asks_value=asks_value)
    return found if isinstance(found, str) else both_prefilled(found)


def both_prefilled(texts: Texts) -> Pair:
    """Prefill both contexts."""
    old, fresh = (prefilled(texts.engine, text) for text in (texts.old_text, texts.new_text))
    pair = Pair(
        texts.case, texts.change, texts.model, texts.old_text, texts.new_text, texts.first_tokens,
        old, fresh, Scale(0.0, 0.0),
    )  # fmt: skip
    return replace(pair, scale=Scale(*pair.gaps([Probe()]), *pair.gaps([Probe()], noising=True)))


def texts_of(model: Model, case: Case, *, system: str | None = None, asks_value: bool = False) -> Texts | str:
    """The two contexts; or the reason why no two values give texts that differ only in the field's tokens.

    Args:
        system: template to use instead of the policy's own.
        asks_value: the question asks for the field's value itself, so the decision is a value and not an action.
    """
    for change in case.changes:
        before, after = (written(model, case, change, case.values(value), system=system) for value in change)
        if aligned(before, after):
            break
    else:
        return "no two values are equally many tokens long"
    if asks_value:
        gate = replace(case.gate, actions={value: value for value in case.gate.actions})
        case = replace(case, gate=gate, scenario=replace(case.scenario, gates=(gate,)))
    tokens = first_tokens(model, case, before)
    if tokens is None:
        return "two actions begin with one token"
    return Texts(case, change, model, before, after, tokens)


def aligned(first: Written, second: Written) -> bool:
    """Whether two texts have the same tokens outside the field."""
    if first.field != second.field or len(first.ids) != len(second.ids):
        return False
    inside = set(first.field.range)
    return all(slot in inside or a == b for slot, (a, b) in enumerate(zip(first.ids, second.ids, strict=True)))


def prefilled(engine: Engine, text: Written) -> KVBuffer:
    """A buffer with all tokens of a text but the last."""
    # Leaves room for the rows that probes add to the context.
    buffer = engine.new_buffer(2 * len(text.ids) + 256)
    engine.append(buffer, text.ids[:-1], logits=0)
    return buffer


def appended_last(pair: Pair, buffer: KVBuffer, slots: Sequence[int]) -> tuple[KVBuffer, Rows]:
    """A copy of a context without some slots, and rows that append these at their positions, and the last row.

    Use it only for gradients (`Engine.graph`), which are of appended rows and whose masks follow positions.
    """
    chosen = tuple(sorted(slots))
    kept = [slot for slot in range(buffer.length) if slot not in set(chosen)]
    other = pair.engine.new_buffer(len(kept) + len(chosen) + 1)
    with other.writing(range(len(kept)), buffer.positions[kept].tolist()):
        for layer, row in zip(other.layers, rows_from(buffer, kept), strict=True):
            layer.update(row.keys, row.values)
    positions = (*chosen, pair.text.last)
    first = len(kept)
    return other, Rows(
        tuple(pair.text.ids[slot] for slot in positions), tuple(range(first, first + len(positions))), positions
    )


def first_tokens(model: Model, case: Case, text: Written) -> Mapping[str, int] | None:
    """Each action's first token; None if two actions share it."""
    options = case.scenario.options
    strings = option_ids(model.tokenizer, text.ends, options, None)
    firsts = {option: ids[0] for option, ids in zip(options, strings, strict=True)}
    return firsts if len(set(firsts.values())) == len(firsts) else None
