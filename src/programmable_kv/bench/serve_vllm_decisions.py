"""Decisions of a served model after a value changed: each arm against the same value in its place in the prompt.

The policies are held out, and their gating field is the value that changes. A gateway receives the old value first, in
another conversation or in an earlier turn, and then the new one. Every decision is one token, greedy between two
actions.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.bench.serve_peers import Peer, gateway
from programmable_kv.bench.vllm_client import ask
from programmable_kv.bench.vllm_server import SERVED, served_folder, serving
from programmable_kv.models.load import load_model
from programmable_kv.records import Record, Recorder, digest_of, wilson
from programmable_kv.scenarios.grammar import Scenario, make_scenario
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.scenarios.vocabulary import held_out_domains
from programmable_kv.serve.rewriting.wording import placeholder

NAME = "serve-vllm-decisions"
SEED = 97_000
COUNT, QUICK = 100, 4
FILLERS = 8
"""Unrelated lines of a policy. Gateways do not share a much shorter one: a line would cost about what it saves."""
TURN_BEFORE = [{"role": "user", "content": "Good morning."}, {"role": "assistant", "content": "How can I help?"}]
ORACLES = {"appended": "in", "by_hand": "in", "erratum_shared": "in", "hoist": "in", "erratum_later": "in_later"}
"""For each arm, the arm with the same messages and the value in its place in the prompt."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy, its field, and two values of the field that lead to actions with different first letters."""

    number: int
    scenario: Scenario
    field: str
    old: str
    new: str
    asked: str

    @property
    def actions(self) -> tuple[str, str]:
        """The right action under the old value, and under the new value."""
        [gate] = self.scenario.gates
        return gate.actions[self.old], gate.actions[self.new]

    def system(self, value: str) -> str:
        """The policy with `value` in the field's place."""
        return self.scenario.prompt.format_map({**self.scenario.values, self.field: value})

    @property
    def rule(self) -> dict[str, Any]:
        """The gateway's rule for the field's line. The rule shares the old value with other conversations."""
        line = next(each for each in self.scenario.prompt.split("\n") if f"{{{self.field}}}" in each)
        before, _, after = line.partition(f"{{{self.field}}}")
        return {"name": self.field, "pattern": f"^{re.escape(before)}(.*){re.escape(after)}$", "share": True}


def decisions(count: int) -> list[Decision]:
    """Held-out policies with one set of rules and some unrelated lines. A longer list begins with the shorter ones."""
    return [_decision(number) for number in range(count)]


def _decision(number: int) -> Decision:
    domains = held_out_domains()
    for attempt in range(100):
        rng = random.Random(f"{SEED}/{number}/{attempt}")
        domain = domains[number % len(domains)]
        scenario = make_scenario(rng, "held_out", domain=domain, fillers=FILLERS, gates=1, two_hop=False)
        [gate] = scenario.gates
        old = scenario.values[gate.field]
        others = sorted(value for value, action in gate.actions.items() if action[0] != gate.actions[old][0])
        if others:
            asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
            return Decision(number, scenario, gate.field, old, rng.choice(others), asked)
    raise AssertionError("no policy has actions with different first letters")


def texts(count: int) -> list[str]:
    """The texts of the policies, values and questions."""
    return [f"{each.system(each.old)}\n{each.new}\n{each.asked}" for each in decisions(count)]


def run(
    python: str,
    path: Path,
    *,
    model: str = "embedded",
    count: int = COUNT,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Decide every policy in every arm and write the record. An interrupted run continues where it stopped.

    Raises:
        ExperimentError: vLLM does not start, or refuses a request.
    """
    folder = served_folder(model)
    loaded = load_model(model)
    drawn = decisions(count)
    recorder = Recorder(
        path, name=path.stem, version=1, title="What a served model decides where a value changed", command=command,
        model=model, model_fingerprint=loaded.fingerprint, data_digest=digest_of(texts(count)), seeds=[SEED],
        settings={"count": count, "decided_by": "first token"},
    )  # fmt: skip
    rules = {"volatile": _distinct([each.rule for each in drawn]), "learn": False}
    tokenizer = loaded.tokenizer
    del loaded
    with (
        tempfile.TemporaryDirectory(prefix="pkv-decisions-") as scratch,
        serving(python, folder, Path(scratch)) as engine,
        gateway("erratum", engine.port, Path(scratch), rules=rules) as erratum,
        gateway("hoist", engine.port, Path(scratch), rules=rules) as hoist,
    ):

        def measure(one: Decision) -> dict[str, Any]:
            firsts = [tokenizer.encode(action, add_special_tokens=False)[0] for action in one.actions]
            return {"number": one.number, **_decided(one, firsts, engine, erratum, hoist)}

        recorder.collect(drawn, lambda one: {"number": one.number}, measure, report)
    return recorder.finish(summarise(recorder.rows))


def _distinct(rules: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rule once: two policies may have the same field in lines of the same form."""
    return list({rule["pattern"]: rule for rule in rules}.values())


def _decided(one: Decision, firsts: Sequence[int], engine: Peer, erratum: Peer, hoist: Peer) -> dict[str, Any]:
    """The action chosen in each arm, and what the gateways did."""
    acted: dict[str, str] = {}

    def choose(peer: Peer, arm: str, system: str, *said: dict[str, str], session: str = "") -> str:
        body = {
            "model": SERVED, "max_tokens": 1, "temperature": 0, "allowed_token_ids": list(firsts), "cache_salt": arm,
            "messages": [{"role": "system", "content": system}, *said],
        }  # fmt: skip
        found = ask(peer.port, body, session=f"{arm}-{one.number}{session}" if peer is not engine else "")
        if peer is not engine:
            acted[f"{arm}_action"] = found["action"]
        return next(
            (action for action in one.actions if found["text"] and action.startswith(found["text"].strip())), ""
        )

    asked = {"role": "user", "content": one.asked}
    old, new, elsewhere = one.system(one.old), one.system(one.new), one.system(placeholder(one.field))
    told = {"role": "user", "content": f"{one.asked}\n\n{one.field}: {one.new}"}
    moved = {"role": "system", "content": f"{one.field}: {one.new}"}
    found = {
        "right": one.actions[1],
        "right_before": one.actions[0],
        "before": choose(engine, "in", old, asked),
        "in": choose(engine, "in", new, asked),
        "in_later": choose(engine, "in", new, *TURN_BEFORE, asked),
        "appended": choose(engine, "appended", elsewhere, told),
        "by_hand": choose(engine, "by_hand", elsewhere, asked, moved),
        "hoist": choose(hoist, "hoist", new, asked),
    }
    choose(erratum, "erratum_shared", old, TURN_BEFORE[0], session="-before")
    found["erratum_shared"] = choose(erratum, "erratum_shared", new, asked)
    choose(erratum, "erratum_later", old, TURN_BEFORE[0])
    found["erratum_later"] = choose(erratum, "erratum_later", new, *TURN_BEFORE, asked)
    return {**found, **acted}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often each arm decides as with the value in its place: over all policies, and over those that the model
    decides correctly under both values (`decided`). `stale` has the old value in its place, as if the new value were
    not read."""
    decided = [row for row in rows if (row["before"], row["in"]) == (row["right_before"], row["right"])]
    summary: dict[str, Any] = {"policies": len(rows), "decided": len(decided)}
    for arm, oracle in {**ORACLES, "before": "in"}.items():
        name = "stale" if arm == "before" else arm
        summary[name] = {
            "agreement": wilson(sum(row[arm] == row[oracle] for row in rows), len(rows)).model_dump(),
            "decided": wilson(sum(row[arm] == row[oracle] for row in decided), len(decided)).model_dump(),
        }
    for arm in ("erratum_shared", "erratum_later", "hoist"):
        did = [row[f"{arm}_action"] for row in rows]
        summary[arm]["actions"] = {action: did.count(action) for action in sorted(set(did))}
    return summary
