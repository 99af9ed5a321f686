"""Does what the notes carry grow with the adapter? Probes models between the base model and `embedded-plain`.

The adapter's training left no checkpoints, so its change of the weights is scaled instead: share 0 is the base model,
share 1 is `embedded-plain`. This is a straight line between two models, not the path that training took.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from programmable_kv.lab.experiments.cases import SEED, Case, cases
from programmable_kv.lab.experiments.heads import note_sets
from programmable_kv.lab.experiments.note_rows import NoteRows
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.read_by_layer import Items
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, rounded, share
from programmable_kv.lab.tools.linear_probes import probe
from programmable_kv.lab.tools.together import Probe
from programmable_kv.models.fetch import adapter_folder, base_folder, merged
from programmable_kv.models.load import Model, load_model, wrap_model
from programmable_kv.models.names import EMBEDDED_PLAIN
from programmable_kv.records import Record, Recorder, digest_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the adapter's change of the weights."""
DEPTHS = (0.33, 0.5, 0.67, 0.77, 0.87)
"""Fractions of the model's depth. Notes are read from the residual stream before the layer at that depth."""
CONTROLS = 3
Row = dict[str, Any]


def run(
    model: Model,
    count: int,
    path: Path,
    *,
    joined: Callable[[float], Model] | None = None,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Probe the same held-out policies at each share of the adapter. The record has one row for each share.

    Args:
        model: the model with the whole adapter; the record names it.
        count: policies to draw; about two thirds can be measured.
        joined: makes the model at a share; None for `embedded-plain`'s (see `at_share`).
    """
    drawn = cases(count)
    make = joined or at_share
    recorder = Recorder(
        path,
        name="along-adapter",
        version=1,
        title="From the base model to embedded-plain, by the share of the adapter's change: decisions and notes",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for case in drawn),
        seeds=[SEED],
        settings={"scenarios": count, "shares": list(SHARES)},
    )
    recorder.collect(
        list(SHARES), lambda each: {"share": each}, lambda each: {"share": each, **looked_at(make(each), drawn)}, report
    )
    return recorder.finish({f"at_{round(100 * row['share'])}": summed(row) for row in recorder.rows})


def at_share(part: float) -> Model:
    """The base model with a share of the adapter of `embedded-plain`, rounded as its weights are stored.

    Raises:
        ModelUnavailableError: the base model could not be obtained.
    """
    return with_adapter(base_folder(), adapter_folder(EMBEDDED_PLAIN), part)


def with_adapter(base: Path, adapter: Path, part: float = 1.0) -> Model:
    """The model of one folder in float32, with a share of another folder's adapter; rounded as embedded weights are.

    Raises:
        ModelUnavailableError: the model could not be loaded, or the adapter does not fit it.
    """
    loaded = load_model(base)
    joined = merged(loaded.engine.model, adapter, part).to(torch.float16).to(torch.float32)
    return replace(wrap_model(joined.eval(), loaded.tokenizer), name=f"{base.name}, {part:.0%} of {adapter.name}")


def looked_at(model: Model, drawn: Sequence[Case]) -> Row:
    """A model's decisions and gaps for each policy, and how well each layer's notes tell whether their rule applies."""
    rows: list[Row] = []
    groups: list[str] = []
    noted: list[Items] = []
    for case in drawn:
        pair = pair_of(model, case)
        if isinstance(pair, Pair):
            rows.append(_one(pair))
            notes = NoteRows(pair)
            noted.append(notes.items(notes.streams(pair.old), notes.streams(pair.fresh)))
            groups += [case.domain] * len(noted[-1].labels)
    return {"policies": rows, "read": _read(Items.together(noted), groups)}


def _one(pair: Pair) -> Row:
    """The gaps of both prefills, and the gap after each set of tokens is patched."""
    notes, text = note_sets(pair), pair.text
    sets = {
        "field": tuple(text.field.range),
        "first_of_actions": NoteRows(pair).slots,
        "actions": notes["actions"],
        "both_rules": notes["both_rules"],
        "later": text.later,
    }
    found = matched(notes["actions"], text.later, random.Random(f"{SEED}/along-adapter/{pair.case.number}"))
    sets |= {"random_as_actions": found[0]} if found is not None else {}
    gaps = pair.gaps([Probe(slots) for slots in sets.values()])
    return {
        "number": pair.case.number, "domain": pair.case.domain, "valid": pair.scale.valid,
        "old_gap": round(pair.scale.old, 4), "new_gap": round(pair.scale.new, 4),
        "patched": rounded(dict(zip(sets, gaps, strict=True))),
    }  # fmt: skip


def _read(items: Items, groups: Sequence[str]) -> dict[str, Any]:
    """By layer, how well a linear probe reads whether a note's rule applies, in domains it never saw."""
    found: dict[str, Any] = {}
    layers = len(items.streams) - 1
    for depth in DEPTHS:
        layer = min(layers, max(1, round(depth * layers)))
        rows, labels, kinds = items.at(layer)
        score = probe(rows, labels, groups, kinds, controls=CONTROLS)
        found[str(layer)] = {"accuracy": score.accuracy.model_dump(), "control": round(score.control, 4)}
    return found


def summed(row: Row) -> dict[str, Any]:
    """Summarise one model: right decisions, spans, and what each set of tokens carries where both prefills are right.

    `kept`: the share of these policies in which the stale decision stays when only the field is patched.
    """
    found = row["policies"]
    valid = [each for each in found if each["valid"]]
    names = dict.fromkeys(name for each in found for name in each["patched"])
    return {
        "policies": len(found),
        "right": share(found, lambda each: each["valid"]),
        "span": mean_by_domain(found, lambda each: each["new_gap"] - each["old_gap"]),
        "kept": share(valid, lambda each: each["patched"]["field"] < 0),
        "read": row["read"],
    } | {name: arm(found, at(f"patched.{name}")) for name in names}
