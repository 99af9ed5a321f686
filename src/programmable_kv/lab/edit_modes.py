"""Does an edited cache decide as a full prefill would? Every edit mode, held out, direct and with a line of thought.

The finding that this package rests on shows here: refreshing only the changed field's own keys and values (`in_place`)
leaves the decision unchanged, because the model decides from what it noted on later tokens at prefill.

For `readers`, the group that a policy looks the field up in is declared. Three more arms recompute as many other
tokens: those that the question attends to most, those that a full prefill changes most (CacheBlend's rule), and random
lines. The edits are the notebook's own, but their rows are computed together, each once (`naming`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.lab import same_budget
from programmable_kv.lab.experiments.summaries import share_true
from programmable_kv.lab.tools.naming import NamingEngine, naming, settled, tried
from programmable_kv.lab.tools.shared_rows import SharedRows
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.prompt.wording import THINK_INSTRUCTION
from programmable_kv.records import Record, Recorder, bootstrap_mean, digest_of
from programmable_kv.scenarios.grammar import Gate, Scenario, other_value
from programmable_kv.scenarios.held_out import held_out_scenarios
from programmable_kv.scenarios.phrasings import PHRASINGS, question

SEED = 88_000
SELECTED = 32
SMALLEST_GAP = 0.5
"""Smallest span in nats between the `full` and `stale` gaps. With less, a recovery is noise and is left out."""
BEFORE = "before"
ARMS = (*map(str, Mode), *same_budget.ARMS)
LAYOUTS = ("asked before", "asked after")
"""Whether the question is part of the cached context, or comes with the decision after the edit."""
THINK = "think"
"""The layout `asked before`, with a line of thought before the answer."""
BY_TENSORS = (str(Mode.SELECTIVE), same_budget.ATTENTION, same_budget.DEVIATION)
"""Arms that choose tokens by keys and values. They are asked last, when most of those are computed."""


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Edit one field in each of `count` held-out scenarios, in every mode, and compare with full prefill."""
    drawn = held_out_scenarios(count, SEED)
    recorder = Recorder(
        path,
        name=path.stem,
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


@dataclass(frozen=True, slots=True)
class _Case:
    """A policy and the one field that changes in it."""

    number: int
    scenario: Scenario
    gate: Gate
    old: str
    new: str
    asked: str

    @classmethod
    def of(cls, number: int, scenario: Scenario) -> _Case:
        rng = random.Random(f"{SEED}/{number}")
        gate = rng.choice(scenario.gates)
        old = scenario.values[gate.field]
        new = other_value(rng, gate, old)
        return cls(number, scenario, gate, old, new, question(rng, PHRASINGS["held_out"], gate.topic, think=False))

    def measured(self, decision: Decision) -> dict[str, Any]:
        return {
            "choice": decision.choice,
            "gap": round(decision.gap(self.gate.actions[self.new], self.gate.actions[self.old]), 5),
            "tokens_computed": decision.account.tokens_computed,
        }


def _one(model: Model, scenario: Scenario, index: int) -> dict[str, Any]:
    case = _Case.of(index, scenario)
    gate, asked = case.gate, case.asked
    named, engine = naming(model, SharedRows(model.engine))
    asks = {
        "asked before": dict(_asks(case, _prefilled(named, scenario, asked))),
        "asked after": dict(_asks(case, _prefilled(named, scenario, None), asked)),
        THINK: dict(_asks(case, _prefilled(named, scenario, f"{asked} {THINK_INSTRUCTION}"), think=True)),
    }
    flat = [(arm, f"{layout}/{arm}", ask) for layout, each in asks.items() for arm, ask in each.items()]
    flat.sort(key=lambda it: it[0] in BY_TENSORS)
    found = settled(engine, {name: ask for _, name, ask in flat})
    row: dict[str, Any] = {"field": gate.field, "old": gate.actions[case.old], "new": gate.actions[case.new]}
    row["rule_sets"] = len(scenario.gates)
    for layout, each in asks.items():
        decisions = {arm: found[f"{layout}/{arm}"] for arm in each}
        row[layout] = {BEFORE: decisions.pop(BEFORE).choice}
        row[layout] |= {arm: case.measured(decision) for arm, decision in decisions.items()}
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


def _asks(
    case: _Case, notebook: Notebook, prompt: str | None = None, *, think: bool = False
) -> Iterator[tuple[str, Callable[[], Decision]]]:
    """Yield each arm with a callable that asks it. A callable leaves the notebook unchanged and may be called again."""
    options, edit = case.scenario.options, {case.gate.field: case.new}
    new, old = (_thoughts(case.gate, value, notebook.model.tokenizer) for value in (case.new, case.old))
    _expect(notebook, new[0][0])

    def ask(mode: Mode | None, k: int = SELECTED) -> Decision:
        notebook._thoughts = [*old, *new] if mode in (None, Mode.STALE) else [*new, *old]
        if mode is None:
            return notebook.decide(prompt, options, think=think)
        return notebook.decide(prompt, options, edits=edit, mode=mode, k=k, think=think)

    for arm, mode in ((BEFORE, None), *((str(mode), mode) for mode in Mode)):
        yield arm, partial(tried, notebook, partial(ask, mode))
    for arm in same_budget.ARMS:
        yield arm, partial(_budgeted, notebook, edit, f"{SEED}/lines/{case.number}", ask, arm)


def _thoughts(gate: Gate, value: str, tokenizer: Any) -> list[list[int]]:
    """Likely lines of thought about a value, as tokens, likeliest first. They are guesses, checked in one forward."""
    own = gate.thought(value).removesuffix(gate.actions[value])
    groups = dict.fromkeys(gate.groups.values()) if gate.groups is not None else ()
    others = [f"{gate.field} is {value}, {gate.kind} {group}, so" for group in groups]
    texts = [
        own.strip(),
        *others,
        f"{gate.field} is {value}, {gate.actions[value]}, so",
        f"{gate.field} is {value}, so",
    ]
    return [tokenizer.encode(text, add_special_tokens=False) for text in dict.fromkeys(texts)]


def _expect(notebook: Notebook, token: int) -> None:
    """Guess that an answer starts with this token."""
    engine, conversation = notebook.model.engine, notebook.prompt.conversation()
    assert isinstance(engine, NamingEngine)
    assert conversation is not None
    opening = conversation.continued([], prompt_for_answer=True).added
    engine.follows[tokenised(notebook.model.tokenizer, Rendered(opening), Kind.TURN).ids[-1]] = token


def _budgeted(
    notebook: Notebook, edit: dict[str, str], seed: str, ask: Callable[[Mode, int], Decision], arm: str
) -> Decision:
    ((_, decision),) = same_budget.decisions(notebook, edit, random.Random(seed), ask, [arm])
    return decision


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement with full prefill and recovery for each mode.

    The interval of the agreement allows for domains; that of the recovery is a bootstrap of the mean.

    Only scenarios that full prefill gets right under the old and the new value count: otherwise there is no decision to
    preserve.
    """
    summary: dict[str, Any] = {"scenarios": len(rows), **_by_layout(rows)}
    return summary | {"one_rule_set": _by_layout([row for row in rows if row["rule_sets"] == 1])}


def _by_layout(rows: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {}
    for layout in (*LAYOUTS, THINK):
        right = [r for r in rows if r[layout]["before"] == r["old"] and r[layout]["full"]["choice"] == r["new"]]
        part: dict[str, Any] = {"counted": len(right)}
        for mode in ARMS:
            agreed = [r[layout][mode]["choice"] == r[layout]["full"]["choice"] for r in right]
            entry: dict[str, Any] = {"agreement": share_true(right, agreed)}
            recoveries = [
                (r[layout][mode]["gap"] - r[layout]["stale"]["gap"]) / span
                for r in right
                if (span := r[layout]["full"]["gap"] - r[layout]["stale"]["gap"]) > SMALLEST_GAP
            ]
            entry["recovery"] = bootstrap_mean(recoveries).model_dump()
            entry["mean_tokens_computed"] = round(
                sum(r[layout][mode]["tokens_computed"] for r in right) / max(1, len(right)), 1
            )
            part[mode] = entry
        parts[layout.replace(" ", "_")] = part
    return parts
