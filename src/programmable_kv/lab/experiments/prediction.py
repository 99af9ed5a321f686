"""Can it be predicted whether an edit will fail? Features of the cached context against edits that are really made.

Policies have three sets of rules, and the topic of the question says which one applies: there, errata fail often
enough. Each edit is made twice: with the question already in the context, and with the question asked after it, where
an erratum fails more often on stock models. A predictor is fit on all domains but one and scored on that one. Features
are of three kinds: those of the prompt; those of its cache and decision; and the strength of its notes, which needs a
prefill of the new text too. All are of the context with the question in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from programmable_kv.edits.modes import Mode
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import at, mean_by_domain, share
from programmable_kv.lab.experiments.written import RULES, TAIL, Part, Text
from programmable_kv.lab.published import as_published
from programmable_kv.lab.statistics.many_tests import benjamini_hochberg, permute_map
from programmable_kv.lab.statistics.prediction import area, predicted
from programmable_kv.lab.tools.together import Probe
from programmable_kv.notebook.notebook import Notebook

MODES = (Mode.ERRATUM, Mode.FIELD_ERRATUM)
ASKED_AFTER = "_asked_after"
"""Suffix of the keys of edits whose question is asked after them."""
KINDS = ("prompt", "before", "notes")
FEWEST = 8
"""Fewest failures, and fewest successes, for which a prediction is made."""


def measure(pair: Pair, _: Sequence[Row]) -> Row:
    """The features, and whether each edit fails."""
    own, new = (pair.probe([Probe()], noising=noising)[0] for noising in (False, True))
    return {
        "right": pair.decides(own) == pair.actions[0] and pair.decides(new) == pair.actions[1],
        "prompt": _of_prompt(pair),
        "before": _of_cache(pair, own),
        "notes": _of_notes(pair),
        "failed": _failures(pair),
    }


def _of_prompt(pair: Pair) -> dict[str, float]:
    text = pair.text
    rules = text.of(Text.OLD_RULE, Text.NEW_RULE)
    return {
        "tokens": len(text.ids),
        "from_field": text.last - text.field.stop,
        "from_rules": text.last - max(rules),
        "between_rules": abs(min(text.of(Text.OLD_RULE)) - min(text.of(Text.NEW_RULE))),
        "values": len(pair.case.gate.actions),
        "options": len(pair.first_tokens),
        "value_tokens": len(text.field),
    }


def _of_cache(pair: Pair, logits: torch.Tensor) -> dict[str, float]:
    """Features of the decision before the edit, and the attention of the row that decides."""
    text, tokens = pair.text, list(pair.first_tokens.values())
    among = torch.log_softmax(logits.cpu().double()[tokens], dim=0).sort(descending=True).values
    rows = Rows((pair.token,), (text.last,), (text.last,))
    by_layer = torch.stack([each.mean(dim=0) for each in pair.engine.attention_weights(pair.old, rows)]).cpu().double()
    late = by_layer[2 * len(by_layer) // 3 :].mean(dim=0)
    actions = [slot for slot in text.of(*RULES) if text.parts[slot] is Part.ACTION]
    sets = {"old_rule": text.of(Text.OLD_RULE), "new_rule": text.of(Text.NEW_RULE), "actions": actions,
            "field": tuple(text.field.range), "tail": text.of(*TAIL), "sinks": range(4)}  # fmt: skip
    found = {
        "margin": float(among[0] - among[1]),
        "entropy": float(-(among.exp() * among).sum()),
        "old_gap": pair.scale.old,
    }
    found |= {f"attention_{name}": float(late[list(slots)].sum()) for name, slots in sets.items()}
    return {name: round(value, 5) for name, value in found.items()}


def _of_notes(pair: Pair) -> dict[str, float]:
    """Strength of the notes: what copies of them change, and how far they move."""
    text = pair.text
    both = text.of(Text.OLD_RULE, Text.NEW_RULE)
    actions = tuple(slot for slot in both if text.parts[slot] is Part.ACTION)
    probes = [Probe(actions), Probe(both), Probe(tuple(text.field.range)), Probe(text.of(*TAIL))]
    patched = pair.gaps(probes)
    left = pair.gaps([Probe(actions)], noising=True)[0]
    apart = torch.stack(list(distances(pair.old, pair.fresh).values())).mean(dim=0)
    span = pair.scale.new - pair.scale.old
    found = {
        "new_gap": pair.scale.new,
        "span": span,
        "actions_moved": patched[0] - pair.scale.old,
        "actions": (patched[0] - pair.scale.old) / span,
        "rules": (patched[1] - pair.scale.old) / span,
        "field": (patched[2] - pair.scale.old) / span,
        "tail": (patched[3] - pair.scale.old) / span,
        "lost": (pair.scale.new - left) / span,
        "apart_actions": float(apart[:, list(actions)].mean()),
        "apart_later": float(apart[:, list(text.later)].mean()),
    }
    return {name: round(value, 5) for name, value in found.items()}


def _failures(pair: Pair) -> dict[str, bool]:
    """Make each edit. It fails if the decision is not the new value's."""
    case = pair.case
    notebook = as_published(Notebook(pair.model))
    notebook.message("system", case.scenario.prompt, **case.values(pair.change[0])).prefill()
    found = {f"{mode}{ASKED_AFTER}": _fails(pair, notebook, mode, case.asked) for mode in MODES}
    notebook.add("user", case.asked)
    return {str(mode): _fails(pair, notebook, mode, None) for mode in MODES} | found


def _fails(pair: Pair, notebook: Notebook, mode: Mode, asked: str | None) -> bool:
    """Whether an edit fails. `asked` is None if the question is already there. The notebook is unchanged."""
    mark = notebook.mark()
    edits = {pair.case.gate.field: pair.change[1]}
    choice = notebook.decide(asked, list(pair.first_tokens), edits=edits, mode=mode).choice
    notebook.rollback(mark)
    return choice != pair.actions[1]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By edit: how often it fails, and how well kinds of features and single ones predict it; mean note strength."""
    right = [row for row in rows if row["right"]]
    summary: dict[str, Any] = {"right": share(rows, lambda row: bool(row["right"])), "predicted": {}, "notes": {}}
    for name in ("actions", "rules", "field", "tail", "lost"):
        summary["notes"][name] = mean_by_domain(right, at(f"notes.{name}"))
    for edit in [f"{mode}{order}" for order in ("", ASKED_AFTER) for mode in MODES]:
        failed = [bool(row["failed"][edit]) for row in right]
        part: dict[str, Any] = {"failed": share(right, partial(_failed, edit)), "failures": sum(failed)}
        if FEWEST <= sum(failed) <= len(failed) - FEWEST:
            part |= _scores(right, failed)
        summary["predicted"][edit] = part
    _adjust([kind for part in summary["predicted"].values() for kind in part.get("kinds", {}).values()])
    return summary


def _adjust(tests: Sequence[dict[str, Any]]) -> None:
    """Add to each prediction by a kind of features its p-value adjusted for all of them (Benjamini and Hochberg)."""
    for test, adjusted in zip(tests, benjamini_hochberg([test["p"] for test in tests]), strict=True):
        test["p_adjusted"] = adjusted


def _failed(edit: str, row: Row) -> bool:
    return bool(row["failed"][edit])


def _scores(rows: Sequence[Row], failed: Sequence[bool]) -> dict[str, Any]:
    domains = [str(row["domain"]) for row in rows]
    found: dict[str, Any] = {"kinds": {}, "features": {}}
    for name, kinds in {**{kind: (kind,) for kind in KINDS}, "all": KINDS}.items():
        table = [[float(value) for kind in kinds for value in row[kind].values()] for row in rows]
        score = predicted(table, failed, domains)
        found["kinds"][name] = {
            "auc": score.auc.model_dump(), "chance": score.chance, "chance_high": score.chance_high, "p": score.p,
        }  # fmt: skip
    names = [(kind, name) for kind in KINDS for name in rows[0][kind]]
    columns = [[float(row[kind][name]) for kind, name in names] for row in rows]
    tests = permute_map(columns, failed, domains)
    for index, (kind, name) in enumerate(names):
        found["features"][f"{kind}_{name}"] = {
            "auc": area([column[index] for column in columns], failed), "p": float(tests.p_values[index]),
        }  # fmt: skip
    return found


PREDICTION = Experiment(
    name="prediction",
    version=2,
    title="Whether it can be told before an edit that it will fail, with three sets of rules",
    measure=measure,
    summarise=summarise,
    scenarios=420,
    sets=3,
    seconds=1.8,
)
