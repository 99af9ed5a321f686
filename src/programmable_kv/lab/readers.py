"""Is it enough to recompute a field and its readers? Compared with errata and with as many other tokens.

The figures are by kind of policy. Held-out policies have one set of rules, two hops (the value is looked up in a group,
which the rules are about) or two sets; with and without thirty unrelated rules in between; with the request in the
cached context, or after the edit. The readers are the lines that mention the field or the group that it is looked up
in, and the request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.lab import same_budget
from programmable_kv.lab.experiments.summaries import share_true
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.records import Record, Recorder, digest_of
from programmable_kv.scenarios.grammar import Gate, Scenario, make_scenario, other_value
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.scenarios.vocabulary import held_out_domains

SEED = 91_000
LAYOUTS = ("asked before", "asked after")
"""Whether the request is part of the cached context, or comes with the decision after the edit."""
MODES = {
    "asked before": (Mode.READERS, Mode.ERRATUM, Mode.FIELD_ERRATUM, Mode.IN_PLACE, Mode.SUFFIX),
    "asked after": (Mode.READERS, Mode.ERRATUM, Mode.FIELD_ERRATUM),
}
BUDGETED = {"asked before": same_budget.ARMS, "asked after": (same_budget.RANDOM_LINES,)}
ARMS = {layout: (*map(str, MODES[layout]), *BUDGETED[layout]) for layout in LAYOUTS}
"""Arms by layout. `asked after` leaves out the arms that decide nothing there: `pkv lab edit-modes` has them."""
THOROUGH = 12
"""Cases of each kind that take every arm in both layouts. The others take `LATER` and random lines, asked before."""
LATER = (Mode.READERS, Mode.ERRATUM, Mode.FIELD_ERRATUM)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of policy."""

    name: str
    gates: int
    two_hop: bool | None
    fillers: int


KINDS = tuple(
    Kind(name + suffix, gates, two_hop, fillers)
    for fillers, suffix in ((0, ""), (30, "_among_30_rules"))
    for name, gates, two_hop in (("one_set", 1, False), ("two_hops", 1, True), ("two_sets", 2, None))
)


@dataclass(frozen=True, slots=True)
class Case:
    """A policy, the one field that changes in it, and the request."""

    number: int
    kind: Kind
    scenario: Scenario
    gate: Gate
    new: str
    asked: str

    @property
    def old(self) -> str:
        return self.scenario.values[self.gate.field]

    def text(self) -> str:
        return f"{self.scenario.text()}\n{self.gate.field} -> {self.new}\n{self.asked}"


def cases(count: int, kinds: Sequence[Kind] = KINDS) -> Iterator[Case]:
    """Yield `count` cases of each kind, from the held-out domains in turn. A longer draw starts with a shorter one."""
    domains = held_out_domains()
    for number in range(count):
        for kind in kinds:
            rng = random.Random(f"{SEED}/{kind.name}/{number}")
            scenario = make_scenario(
                rng, "held_out", gates=kind.gates, two_hop=kind.two_hop, fillers=kind.fillers,
                domain=domains[number % len(domains)],
            )  # fmt: skip
            gate = rng.choice(scenario.gates)
            new = other_value(rng, gate, scenario.values[gate.field])
            asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
            yield Case(number, kind, scenario, gate, new, asked)


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Change one field in each of `count` policies of each kind, in every arm, and compare with full prefill."""
    drawn = list(cases(count))
    recorder = Recorder(
        path,
        name=path.stem,
        version=2,
        title="Agreement with full prefill where a field and its readers are computed again",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for case in drawn),
        seeds=[SEED],
        settings={"count": count, "thorough": THOROUGH},
    )
    recorder.collect(drawn, lambda it: {"number": it.number, "kind": it.kind.name}, lambda it: _row(model, it), report)
    return recorder.finish(summarise(recorder.rows))


def notebook_of(model: Model, case: Case, *, asked: bool) -> Notebook:
    """A prefilled notebook with the policy, and the request if `asked`. Declares the group of a looked-up field."""
    notebook = Notebook(model).message("system", case.scenario.prompt, **case.scenario.values)
    if case.gate.kind is not None:
        notebook.mentions(case.gate.field, case.gate.kind)
    if asked:
        notebook.message("user", case.asked)
    notebook.prefill()
    return notebook


def _row(model: Model, case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": case.number, "kind": case.kind.name, "domain": case.scenario.domain, "field": case.gate.field,
        "old": case.gate.actions[case.old], "new": case.gate.actions[case.new],
    }  # fmt: skip
    thorough = case.number < THOROUGH
    for layout in LAYOUTS if thorough else LAYOUTS[:1]:
        notebook = notebook_of(model, case, asked=layout == "asked before")
        prompt = None if layout == "asked before" else case.asked
        if prompt is None:
            # Both layouts have the same text at the decision, so one full prefill serves both.
            row["before"] = notebook.decide(None, case.scenario.options).choice
            row["full"] = edited(notebook, None, case, Mode.FULL)
        modes = MODES[layout] if thorough else LATER
        budgeted = BUDGETED[layout] if thorough else (same_budget.RANDOM_LINES,)
        row[layout] = dict(_arms(notebook, prompt, case, modes, budgeted))
    return row


def _arms(
    notebook: Notebook, prompt: str | None, case: Case, modes: Sequence[Mode], budgeted: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for mode in modes:
        yield str(mode), edited(notebook, prompt, case, mode)

    def ask(mode: Mode, k: int) -> Decision:
        return decision_of(notebook, prompt, case, mode, k)

    rng = random.Random(f"{SEED}/lines/{case.kind.name}/{case.number}")
    for arm, decision in same_budget.decisions(notebook, {case.gate.field: case.new}, rng, ask, budgeted):
        yield arm, measured(decision)


def edited(notebook: Notebook, prompt: str | None, case: Case, mode: Mode) -> dict[str, Any]:
    """The decision after the edit. Rolls the notebook back."""
    mark = notebook.mark()
    decision = decision_of(notebook, prompt, case, mode)
    notebook.rollback(mark)
    return measured(decision)


def decision_of(notebook: Notebook, prompt: str | None, case: Case, mode: Mode, k: int = 1) -> Decision:
    edit = {case.gate.field: case.new}
    return notebook.decide(prompt, case.scenario.options, edits=edit, mode=mode, k=k)


def measured(decision: Decision) -> dict[str, Any]:
    return {"choice": decision.choice, "tokens_computed": decision.account.tokens_computed}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement by layout: over all cases, by kind, and with and without unrelated rules.

    Only cases that full prefill gets right under the old and the new value count: otherwise there is no decision to
    preserve. Each arm's agreement has its own number of cases, as not all cases take every arm. The intervals
    allow for domains.
    """
    few = {kind.name for kind in KINDS if not kind.fillers}
    groups: dict[str, Callable[[dict[str, Any]], bool]] = {
        "all": lambda row: True,
        "alone": lambda row: row["kind"] in few,
        "among_30_rules": lambda row: row["kind"] not in few,
        **{kind.name: lambda row, name=kind.name: row["kind"] == name for kind in KINDS},  # type: ignore[misc]
    }
    return {
        group: {
            layout.replace(" ", "_"): _agreement([row for row in rows if belongs(row)], layout) for layout in LAYOUTS
        }
        for group, belongs in groups.items()
    }


def _agreement(rows: list[dict[str, Any]], layout: str) -> dict[str, Any]:
    right = [row for row in rows if row["before"] == row["old"] and row["full"]["choice"] == row["new"]]
    part: dict[str, Any] = {"drawn": len(rows), "counted": len(right)}
    part["full"] = {"mean_tokens_computed": _mean([row["full"]["tokens_computed"] for row in right])}
    for arm in ARMS[layout]:
        ran = [row for row in right if arm in row.get(layout, {})]
        part[arm] = {
            "agreement": share_true(ran, [row[layout][arm]["choice"] == row["full"]["choice"] for row in ran]),
            "mean_tokens_computed": _mean([row[layout][arm]["tokens_computed"] for row in ran]),
        }
    return part


def _mean(values: list[int]) -> float:
    return round(sum(values) / max(1, len(values)), 1)
