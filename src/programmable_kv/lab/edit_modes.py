"""Does an edited cache decide as a full prefill would? Every mode, direct and with one line of thought, held out.

The discovery this package rests on shows here: refreshing the changed field's own keys and values (`in_place`) leaves
the decision where it was, because the model decides from what it noted on later tokens at prefill.

For `readers` the words are declared that a policy looks the field up in. Two more arms compute as many other tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.lab import same_budget
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.wording import THINK_INSTRUCTION
from programmable_kv.records import Record, Recorder, bootstrap_mean, digest_of, wilson
from programmable_kv.scenarios.grammar import Gate, Scenario, other_value
from programmable_kv.scenarios.held_out import held_out_scenarios
from programmable_kv.scenarios.phrasings import PHRASINGS, question

SEED = 88_000
SELECTED = 32
SMALLEST_GAP = 0.5
"""nats between the full prefills' gaps below which a recovery would divide by noise; such scenarios give none"""
BUDGETED = (same_budget.ATTENTION, same_budget.RANDOM_LINES)
LAYOUTS = ("asked before", "asked after")
"""whether the question is part of the cached context, or comes with the decision, after the edit"""


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Edit one field in each of `count` held-out scenarios, in every mode, and compare with full prefill."""
    drawn = held_out_scenarios(count, SEED)
    recorder = Recorder(
        path,
        name="edit-modes",
        version=2,
        title="Agreement with full prefill and recovery, by edit mode",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(scenario.text() for scenario in drawn),
        seeds=[SEED],
        settings={"scenarios": count, "selected": SELECTED, "smallest_gap": SMALLEST_GAP},
    )
    recorder.collect(
        list(enumerate(drawn)),
        lambda it: {"scenario": it[0]},
        lambda it: {"scenario": it[0], "domain": it[1].domain, **_one(model, it[1], it[0])},
        report,
    )
    return recorder.finish(summarise(recorder.rows))


def _one(model: Model, scenario: Scenario, index: int) -> dict[str, Any]:
    rng = random.Random(f"{SEED}/{index}")
    gate = rng.choice(scenario.gates)
    old = scenario.values[gate.field]
    new = other_value(rng, gate, old)
    asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
    row: dict[str, Any] = {"field": gate.field, "old": gate.actions[old], "new": gate.actions[new]}
    row["rule_sets"] = len(scenario.gates)
    for layout in LAYOUTS:
        notebook = _prefilled(model, scenario, asked if layout == "asked before" else None)
        prompt = None if layout == "asked before" else asked
        row[layout] = {
            "before": notebook.decide(prompt, scenario.options).choice,
            **_modes(notebook, prompt, scenario, gate, old, new, index, think=False),
        }
    notebook = _prefilled(model, scenario, f"{asked} {THINK_INSTRUCTION}")
    row["think"] = {
        "before": notebook.decide(None, scenario.options, think=True).choice,
        **_modes(notebook, None, scenario, gate, old, new, index, think=True),
    }
    return row


def _prefilled(model: Model, scenario: Scenario, asked: str | None) -> Notebook:
    notebook = Notebook(model)
    notebook.message("system", scenario.prompt, **scenario.values)
    for gate in scenario.gates:
        if gate.kind is not None:
            notebook.mentions(gate.field, gate.kind)
    if asked is not None:
        notebook.message("user", asked)
    notebook.prefill()
    return notebook


def _modes(
    notebook: Notebook,
    prompt: str | None,
    scenario: Scenario,
    gate: Gate,
    old: str,
    new: str,
    index: int,
    *,
    think: bool,
) -> dict[str, dict[str, Any]]:
    edit = {gate.field: new}

    def ask(mode: Mode, k: int = SELECTED) -> Decision:
        return notebook.decide(prompt, scenario.options, edits=edit, mode=mode, k=k, think=think)

    found = {}
    for mode in Mode:
        mark = notebook.mark()
        found[str(mode)] = ask(mode)
        notebook.rollback(mark)
    found |= same_budget.decisions(notebook, edit, random.Random(f"{SEED}/lines/{index}"), ask, BUDGETED)
    return {
        arm: {
            "choice": decision.choice,
            "gap": round(decision.gap(gate.actions[new], gate.actions[old]), 5),
            "tokens_computed": decision.account.tokens_computed,
        }
        for arm, decision in found.items()
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement (Wilson) and recovery (bootstrap of the mean) for each mode.

    Only scenarios where full prefill is right about the old and about the new value count: elsewhere there is no decision
    to preserve.
    """
    summary: dict[str, Any] = {"scenarios": len(rows), **_by_layout(rows)}
    return summary | {"one_rule_set": _by_layout([row for row in rows if row["rule_sets"] == 1])}


def _by_layout(rows: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {}
    for layout in (*LAYOUTS, "think"):
        right = [r for r in rows if r[layout]["before"] == r["old"] and r[layout]["full"]["choice"] == r["new"]]
        part: dict[str, Any] = {"counted": len(right)}
        for mode in (*Mode, *BUDGETED):
            agreed = sum(r[layout][mode]["choice"] == r[layout]["full"]["choice"] for r in right)
            entry: dict[str, Any] = {"agreement": wilson(agreed, len(right)).model_dump()}
            recoveries = [
                (r[layout][mode]["gap"] - r[layout]["stale"]["gap"]) / span
                for r in right
                if (span := r[layout]["full"]["gap"] - r[layout]["stale"]["gap"]) > SMALLEST_GAP
            ]
            entry["recovery"] = bootstrap_mean(recoveries).model_dump()
            entry["mean_tokens_computed"] = round(
                sum(r[layout][mode]["tokens_computed"] for r in right) / max(1, len(right)), 1
            )
            part[str(mode)] = entry
        parts[layout.replace(" ", "_")] = part
    return parts
