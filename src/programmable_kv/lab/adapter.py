"""Does an embedded model follow policies it never saw? Held-out domains, fields, values, actions and phrasings.

A drawn policy has one set of 2 to 4 rules, or two such sets for two topics of requests. A rule depends on the field's
value, or on the group that the value is looked up in (two hops). The summary reports each kind separately.

All questions about a scenario use one exact cache. Appending to an exact cache is, by causality, a full prefill of the
whole text (a unit test checks this), so each scenario's policy is computed once.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from programmable_kv.lab.experiments.summaries import share_true
from programmable_kv.models.load import Model, load_model
from programmable_kv.models.names import EMBEDDED
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE, statement
from programmable_kv.records import Record, Recorder, digest_of, record_for
from programmable_kv.scenarios.grammar import Scenario, other_value
from programmable_kv.scenarios.held_out import held_out_scenarios
from programmable_kv.scenarios.phrasings import PHRASINGS, question, update
from programmable_kv.scenarios.plain_text import documents
from programmable_kv.scenarios.vocabulary import held_out_domains

SEED = 77_000
KINDS = ("direct", "update", "default_update", "irrelevant_update", "several_updates", "think")
"""Questions asked about each scenario. `default_update` is worded as this package's own erratum."""
FULLY_ASKED = 200
"""Number of scenarios that get every question. The others skip `several_updates` and `think`."""
PARTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "one_rule_set": lambda row: row["rule_sets"] == 1,
    "two_rule_sets": lambda row: row["rule_sets"] == 2,
    "at_most_four_rules": lambda row: row["rules"] <= 4,
    "two_hops": lambda row: row["rule_sets"] == 1 and row["two_hops"],
}
"""Kinds of policies that the summary reports separately."""


def evaluate(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Ask the questions in `KINDS` about `count` held-out scenarios, and write the record."""
    drawn = held_out_scenarios(count, SEED)
    recorder = Recorder(
        path,
        name=record_name(model),
        version=2,
        title=f"{'The embedded model' if model.name == EMBEDDED else model.name} on held-out gated decisions",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(scenario.text() for scenario in drawn),
        seeds=[SEED],
        settings={"scenarios": count, "domains": len(held_out_domains())},
    )
    for index, scenario in enumerate(drawn):
        if not recorder.done(scenario=index):
            recorder.add({"scenario": index, "domain": scenario.domain, **_ask(model, scenario, index)})
        if report is not None:
            report(index + 1, count)
    return recorder.finish(summarise(recorder.rows))


def record_name(model: Model) -> str:
    """The record's name. The default model's has no model in it."""
    return record_for("adapter-held-out", model.name, EMBEDDED)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of right answers, over all policies and over each of `PARTS`. The intervals allow for domains."""
    summary: dict[str, Any] = _rates(rows)
    return summary | {name: _rates([row for row in rows if belongs(row)]) for name, belongs in PARTS.items()}


def _rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {kind: share_true(rows, [row.get(kind) for row in rows]) for kind in KINDS}


def _ask(model: Model, scenario: Scenario, index: int) -> dict[str, Any]:
    rng = random.Random(f"{SEED}/ask/{index}")
    gate = rng.choice(scenario.gates)
    value = scenario.values[gate.field]
    asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
    notebook = Notebook(model)
    notebook.message("system", scenario.prompt, **scenario.values)
    notebook.prefill()

    def right(*updates: str, expect: str, think: bool = False) -> bool:
        mark = notebook.mark()
        for line in updates:
            notebook.add("system", line)
        decision = notebook.decide(asked, scenario.options, think=think)
        notebook.rollback(mark)
        return decision.choice == expect

    def update_to(new: str, name: str = gate.field) -> str:
        return update(rng, PHRASINGS["held_out"], name, new)

    new = other_value(rng, gate, value)
    between = rng.choice([v for v in sorted(gate.actions) if v != value])
    last = new if between != new else other_value(rng, gate, between)
    irrelevant = rng.choice(sorted(scenario.irrelevant))
    unrelated = rng.choice(list(scenario.irrelevant[irrelevant]))
    answers: dict[str, Any] = {
        "rule_sets": len(scenario.gates),
        "rules": sum(gate.rules for gate in scenario.gates),
        "two_hops": gate.groups is not None,
        "direct": right(expect=gate.actions[value]),
        "update": right(update_to(new), expect=gate.actions[new]),
        "default_update": right(statement(DEFAULT_TEMPLATE, gate.field, new), expect=gate.actions[new]),
        "irrelevant_update": right(update_to(unrelated, irrelevant), expect=gate.actions[value]),
    }
    if index < FULLY_ASKED:
        answers["several_updates"] = right(update_to(between), update_to(last), expect=gate.actions[last])
        answers["think"] = right(expect=gate.actions[value], think=True)
    return answers


@torch.no_grad()
def perplexity(model: Model, *, tokens: int = 20_000, window: int = 512) -> float:
    """Perplexity on plain text that training never replayed: standard-library docstrings, non-overlapping windows."""
    engine, total, counted = model.engine, 0.0, 0
    for text in documents("held_out"):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids), window):
            chunk = ids[start : start + window]
            if len(chunk) < 16:
                continue
            logits = engine.append(engine.new_buffer(len(chunk)), chunk, logits=len(chunk))
            loss = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(chunk[1:]), reduction="sum")
            total, counted = total + float(loss), counted + len(chunk) - 1
        if counted >= tokens:
            break
    return math.exp(total / counted)


def write_abilities(path: Path, *, base: Model, adapted: Model, command: str) -> Record:
    """Write the adapter's effect on plain text: perplexity of the base and the adapted model on the same sample."""
    recorder = Recorder(
        path,
        name="adapter-abilities",
        version=1,
        title="Perplexity on plain text, before and after the adapter",
        command=command,
        model=adapted.name,
        model_fingerprint=adapted.fingerprint,
        data_digest=digest_of(documents("held_out")),
        seeds=[],
        settings={"tokens": 20_000, "window": 512, "text": "docstrings of standard-library modules from 'p' on"},
    )
    for name, model in (("base", base), ("adapted", adapted)):
        if not recorder.done(which=name):
            recorder.add({"which": name, "perplexity": perplexity(model), "fingerprint": model.fingerprint})
    found = {row["which"]: row["perplexity"] for row in recorder.rows}
    return recorder.finish({**found, "ratio": found["adapted"] / found["base"]})


def base_model() -> Model:
    """The embedded model without the adapter."""
    from programmable_kv.models.fetch import base_folder

    return replace(load_model(base_folder()), name="embedded base")


def attach_figures(folder: Path, record: Record) -> None:
    """Write the held-out figures to `training.json`, next to the weights they were measured on."""
    summary = training_summary(folder)
    summary["held_out"] = {kind: record.model_dump(mode="json")["summary"][kind] for kind in KINDS}
    (folder / "training.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")


def training_summary(folder: Path) -> dict[str, Any]:
    """The training record that ships with the adapter's weights."""
    loaded: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return loaded
