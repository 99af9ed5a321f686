"""What does the decision read? Blocks attention from the question and the deciding row, by text and band of layers.

Compares the effects with the attention that the deciding row pays to the same tokens: does attention say what matters?
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import at, mean_by_domain, share
from programmable_kv.lab.experiments.written import RULES, TAIL, Part, Text, Written
from programmable_kv.lab.statistics.ranks import spearman
from programmable_kv.lab.tools.branches import Branch, branching
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.readouts import kl
from programmable_kv.lab.tools.together import Probe

SINKS = 4
"""First tokens, which attention falls back on whatever they say. They are a set of their own."""
BANDS = ("all", "early", "middle", "late")
RANKED = 64
"""Random tokens of a context by which attention and effect are ranked against each other."""


def bands(layers: int) -> dict[str, tuple[int, ...]]:
    """All layers, and each non-empty third of them."""
    cuts = [round(layers * part / 3) for part in range(4)]
    thirds = {name: tuple(range(cuts[i], cuts[i + 1])) for i, name in enumerate(BANDS[1:])}
    return {BANDS[0]: tuple(range(layers)), **{name: which for name, which in thirds.items() if which}}


def sets(text: Written) -> dict[str, tuple[int, ...]]:
    """The slots that are blocked together. None is in the question or after it."""
    first = min(text.of(*TAIL))
    policy = [slot for slot in text.later if slot < first]
    return {
        "field": tuple(text.field.range),
        "old_rule": text.of(Text.OLD_RULE),
        "rules": text.of(*RULES),
        "actions": tuple(slot for slot in text.of(*RULES) if text.parts[slot] is Part.ACTION),
        "filler": text.of(Text.FILLER),
        "delimiters": tuple(slot for slot in policy if text.delimits(slot)),
        "sinks": tuple(range(SINKS)),
        "policy": tuple(policy),
    }


def measure(pair: Pair, _: Sequence[Row]) -> Row:
    """What blocking each set does to the right decision of the old context, and the attention that the set gets."""
    text = pair.text
    tail = tuple(slot for slot in range(min(text.of(*TAIL)), text.last + 1))
    layers = bands(len(pair.old))
    blocked = sets(text)
    blocked |= dict(_nulls(pair, blocked))
    arms = [(name, band) for name in blocked for band in layers]
    clean, *others = _tail_logits(pair, tail, [(), *((blocked[name], layers[band]) for name, band in arms)])
    row: Row = {"clean": pair.decides(clean) == pair.actions[0], "blocked": {}, "attention": {}}
    row["blocked"] = {name: {"tokens": len(slots)} for name, slots in blocked.items()}
    for (name, band), logits in zip(arms, others, strict=True):
        row["blocked"][name][band] = _effect(pair, clean, logits)
    # The deciding row alone. It may not read its own question either.
    own = {"tail": text.of(*TAIL), "field": blocked["field"], "rules": blocked["rules"], "policy": blocked["policy"]}
    probes = [Probe(blocked=slots, layers=which) for slots in own.values() for which in layers.values()]
    found = iter(pair.probe(probes))
    row["last_row"] = {
        name: {"tokens": len(slots)} | {band: _effect(pair, clean, next(found)) for band in layers}
        for name, slots in own.items()
    }
    row |= _attention(pair, blocked | {"tail": own["tail"]}, layers)
    return row


def _tail_logits(
    pair: Pair, tail: tuple[int, ...], blocked: Sequence[tuple[()] | tuple[tuple[int, ...], tuple[int, ...]]]
) -> torch.Tensor:
    """The last row's logits [blocked, vocabulary] if the question and what follows are recomputed, once for each entry
    of `blocked`: what they cannot read, which is nothing, or slots in some layers."""
    ids = tuple(pair.text.ids[slot] for slot in tail)
    with taken_back(pair.old):
        pair.old.truncate(tail[0])
        with branching(pair.engine, pair.old) as branches:
            return branches.last([Branch(ids, tail, *each) for each in blocked])


def _effect(pair: Pair, clean: torch.Tensor, logits: torch.Tensor) -> dict[str, float | bool]:
    return {
        "kl": round(float(kl(clean, logits)), 5),
        "lost": round(float(pair.gap_in(logits) - pair.gap_in(clean)), 4),
        "changed": pair.decides(logits) != pair.decides(clean),
    }


def _nulls(pair: Pair, chosen: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """As many other tokens of the policy as its rules and as their actions have, from the same places."""
    rng = random.Random(f"{SEED}/knock-out/{pair.case.number}")
    for name in ("rules", "actions"):
        found = matched(chosen[name], chosen["policy"], rng)
        if found is not None:
            yield f"random_as_{name}", found[0]


def _attention(pair: Pair, chosen: dict[str, tuple[int, ...]], layers: dict[str, tuple[int, ...]]) -> Row:
    """The share of the deciding row's attention that each set gets, and whether a token's attention ranks its effect.

    The ranking uses some random tokens only: a mean over many policies needs few of each.
    """
    text = pair.text
    rows = Rows((pair.token,), (text.last,), (text.last,))
    by_layer = torch.stack([each.mean(dim=0) for each in pair.engine.attention_weights(pair.old, rows)]).float()
    mass = {
        name: {band: round(float(by_layer[list(which)][:, list(slots)].sum(dim=1).mean()), 5)
               for band, which in layers.items()}
        for name, slots in chosen.items()
    }  # fmt: skip
    slots = list(range(SINKS, text.last))
    slots = sorted(random.Random(f"{SEED}/knock-out/rank/{pair.case.number}").sample(slots, min(RANKED, len(slots))))
    effects = [abs(g - pair.scale.old) for g in pair.gaps([Probe(blocked=(slot,)) for slot in slots])]
    found = spearman(by_layer[:, slots].mean(dim=0).tolist(), effects)
    return {"attention": mass, "rank_correlation": None if found is None else round(found, 4)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Shares of decisions that change, the divergence in nats, and the attention that each set gets."""
    return {
        "clean_right": share(rows, lambda row: bool(row["clean"])),
        "blocked": dict(_effects(rows, "blocked")),
        "last_row": dict(_effects(rows, "last_row")),
        "attention": {
            name: {band: mean_by_domain(rows, at(f"attention.{name}.{band}")) for band in BANDS}
            for name in dict.fromkeys(name for row in rows for name in row["attention"])
        },
        "rank_correlation": mean_by_domain(rows, at("rank_correlation")),
    }


def _effects(rows: Sequence[Row], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in dict.fromkeys(name for row in rows for name in row[part]):
        found: dict[str, Any] = {"tokens": mean_by_domain(rows, at(f"{part}.{name}.tokens"))["value"]}
        for band in BANDS:
            path = f"{part}.{name}.{band}"

            def changed(row: Row, path: str = path) -> bool | None:
                value = at(f"{path}.changed")(row)
                return None if value is None else bool(value)

            found[band] = {
                "changed": share(rows, changed),
                "kl": mean_by_domain(rows, at(f"{path}.kl")),
                "lost": mean_by_domain(rows, at(f"{path}.lost")),
            }
        yield name, found


KNOCK_OUT = Experiment(
    name="knock-out",
    version=1,
    title="What the decision loses when attention to a kind of text is blocked",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    seconds=1.8,
)
