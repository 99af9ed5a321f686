"""An agent on one live cache against one that prefills its whole context every turn: the same decisions? how much sooner?

The rival re-renders its system message with the current values, appends the conversation so far, and prefills everything,
as an agent without a programmable cache has to when its state changes. Each keeps a trajectory of its own: what it
answered is what it reads later. Two questions, two kinds of rows:

- `decisions`: held-out policies, compiled once and spliced; in half of the turns the state changes before the request.
- `time`: one policy padded to a length, many turns; the sum of the times to the first answer token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.account import Account
from programmable_kv.adapter.evaluate import other_value
from programmable_kv.adapter.grammar import PHRASINGS, Scenario, domains, make_scenario, question
from programmable_kv.agent.agent import Agent
from programmable_kv.bench.edit import padded_policy
from programmable_kv.demo.demo import CASES, VALUES
from programmable_kv.model import Model
from programmable_kv.notebook.decision import option_ids, score
from programmable_kv.notebook.parts import Message, Text, render_chat
from programmable_kv.notebook.skill import Skill
from programmable_kv.records import Record, Recorder, digest_of, wilson

SEED = 66_000
DOMAINS = (*domains("held_out"), *domains("held_out_more"))
LENGTHS = (1024, 2048, 4096)
"""tokens of the timed policies"""
INSTANCES = 10
"""policies of each held-out domain"""
TURNS = 6
TIMED_TURNS = 12


@dataclass(frozen=True, slots=True)
class Step:
    """What happens before a turn, what is asked, and what is right."""

    changes: dict[str, str]
    request: str
    options: tuple[str, ...]
    right: str


def run(
    model: Model,
    path: Path,
    *,
    instances: int = INSTANCES,
    lengths: Sequence[int] = LENGTHS,
    turns: int = TURNS,
    timed_turns: int = TIMED_TURNS,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Both parts, into one record."""
    drawn = policies(instances)
    recorder = Recorder(
        path,
        name="agent",
        version=1,
        title="An agent on a live cache against re-prefilling every turn",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(scenario.text() for scenario in drawn),
        seeds=[SEED],
        settings={
            "instances": instances,
            "domains": len(DOMAINS),
            "turns": turns,
            "timed_turns": timed_turns,
            "lengths": list(lengths),
        },
    )
    model.engine.verify()
    work = len(drawn) + len(lengths)
    for number, scenario in enumerate(drawn):
        if not recorder.done(kind="decisions", policy=number):
            steps = list(trajectory(scenario, turns, random.Random(f"{SEED}/{number}")))
            recorder.add(
                {
                    "kind": "decisions",
                    "policy": number,
                    "domain": scenario.domain,
                    "turns": _both(model, scenario.prompt, dict(scenario.values), steps),
                }
            )
        if report is not None:
            report(number + 1, work)
    for number, length in enumerate(lengths):
        if not recorder.done(kind="time", length=length):
            row = _both(model, padded_policy(model, length), dict(VALUES), list(_timed_steps(timed_turns)))
            recorder.add({"kind": "time", "length": length, "turns": row})
        if report is not None:
            report(len(drawn) + number + 1, work)
    return recorder.finish(summarise(recorder.rows))


def policies(instances: int) -> list[Scenario]:
    """As many scenarios of every domain that training never saw."""
    return [
        make_scenario(random.Random(f"{SEED}/{domain.name}/{number}"), "held_out", domain=domain)
        for domain in DOMAINS
        for number in range(instances)
    ]


def trajectory(scenario: Scenario, turns: int, rng: random.Random) -> Iterator[Step]:
    """Requests about a policy's gates; before half of them the asked gate's field changes to a value that decides otherwise."""
    values = dict(scenario.values)
    for _ in range(turns):
        gate = rng.choice(scenario.gates)
        changes = {}
        if rng.random() < 0.5:
            changes[gate.field] = other_value(rng, gate, values[gate.field])
            values |= changes
        asked = question(rng, PHRASINGS["held_out"], gate, think=False)
        yield Step(changes, asked, scenario.options, gate.actions[values[gate.field]])


def _timed_steps(turns: int) -> Iterator[Step]:
    """The demo's requests in turn; before every second one, its field takes its other value."""
    values = dict(VALUES)
    for number in range(turns):
        case = CASES[number // 2 % len(CASES)]
        changes = {}
        if number % 2:
            changes[case.field] = case.value if values[case.field] != case.value else VALUES[case.field]
            values |= changes
        right = case.after if values[case.field] == case.value else case.before
        yield Step(changes, case.request, (case.before, case.after), right)


def _both(model: Model, policy: str, state: dict[str, str], steps: list[Step]) -> list[dict[str, Any]]:
    """Every turn of both agents: was it right, did they agree, tokens and milliseconds to the first answer token."""
    skill = Skill.compile(model, policy, name="policy", **state)
    agent = Agent(model, skill)
    composing = agent.composed
    rival = Rival(model, policy, state)
    rows = []
    for number, step in enumerate(steps):
        turn = agent.act(step.request, step.options, step.changes)
        ours, theirs = turn.decision, rival.act(step)
        rows.append(
            {
                "changed": bool(step.changes),
                "right": theirs.choice == step.right,
                "agent_right": ours.choice == step.right,
                "agrees": ours.choice == theirs.choice,
                "agent_tokens": ours.account.tokens_computed + (composing.tokens_computed if number == 0 else 0),
                "rival_tokens": theirs.account.tokens_computed,
                "agent_ttft_ms": round(ours.ttft_ms + (1e3 * composing.seconds if number == 0 else 0), 2),
                "rival_ttft_ms": round(1e3 * theirs.account.seconds, 2),
            }
        )
    return rows


class Rival:
    """Renders its state into the system message and prefills everything, every turn, in one forward."""

    def __init__(self, model: Model, policy: str, state: dict[str, str]) -> None:
        self.model, self.state = model, state
        self.messages = [Message("system", Text(policy, tuple(state)))]

    def act(self, step: Step) -> _Answer:
        engine, tokenizer = self.model.engine, self.model.tokenizer
        self.state |= step.changes
        self.messages.append(Message("user", Text(step.request)))
        with engine.meter.measure() as reading:
            text = render_chat(tokenizer, self.messages, self.state, prompt_for_answer=True).text
            ids = tokenizer.encode(text, add_special_tokens=False)
            buffer = engine.new_buffer(len(ids) + 64)
            logits = engine.append(buffer, ids)
        strings = option_ids(tokenizer, text, step.options, tokenizer.eos_token_id)
        scores = score(engine, buffer, logits, strings)
        choice = step.options[max(range(len(scores)), key=lambda index: scores[index])]
        self.messages.append(Message("assistant", Text(choice)))
        return _Answer(choice, reading.account)


@dataclass(frozen=True, slots=True)
class _Answer:
    choice: str
    account: Account


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement where the rival is right (Wilson), both rates of right answers, and ratios of the summed times and tokens."""
    turns = [turn for row in rows if row["kind"] == "decisions" for turn in row["turns"]]
    right = [turn for turn in turns if turn["right"]]
    summary: dict[str, Any] = {"decisions": len(turns)}
    for name, counted in (("agreement", right), ("agreement_on_all", turns)):
        summary[name] = wilson(sum(turn["agrees"] for turn in counted), len(counted)).model_dump()
    changed = [turn for turn in right if turn["changed"]]
    summary["agreement_after_a_change"] = wilson(sum(t["agrees"] for t in changed), len(changed)).model_dump()
    summary["agent_right"] = wilson(sum(turn["agent_right"] for turn in turns), len(turns)).model_dump()
    summary["rival_right"] = wilson(len(right), len(turns)).model_dump()
    for row in rows:
        if row["kind"] == "time":
            sums = {
                key: sum(turn[key] for turn in row["turns"]) for key in row["turns"][0] if key.endswith(("ms", "ns"))
            }
            summary[f"at_{row['length']}"] = {
                "rival_over_agent_ttft": round(sums["rival_ttft_ms"] / sums["agent_ttft_ms"], 2),
                "rival_over_agent_tokens": round(sums["rival_tokens"] / sums["agent_tokens"], 2),
                "agent_seconds": round(sums["agent_ttft_ms"] / 1e3, 2),
                "rival_seconds": round(sums["rival_ttft_ms"] / 1e3, 2),
                "turns": len(row["turns"]),
            }
    return summary
