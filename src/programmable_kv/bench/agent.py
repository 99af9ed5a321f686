"""Compares an agent on one live cache with one that prefills its whole context every turn, in decisions and in time.

The rival renders its system message with the current values, appends the conversation so far, and prefills everything,
as an agent without a programmable cache must when its state changes. For times, a second rival plays the same turns
with a prefix cache: it keeps the prefix that its context shares with the previous one. Each agent has its own
trajectory: it reads its own earlier answers. The record has two kinds of rows:

- `decisions`: held-out policies, compiled once and spliced. The state changes before about half of the requests. One
  agent plays in each of several edit modes. - `time`: one policy padded to a length and many turns, with the tokens and
  the time to the first answer token of each turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.account import Account
from programmable_kv.agent.agent import Agent
from programmable_kv.bench.edit import padded_policy
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.demo.demo import CASES, VALUES
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.modes import DEFAULT_MODE, Mode, parse_mode
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import likeliest, option_ids
from programmable_kv.prompt.chat import render_chat
from programmable_kv.prompt.parts import Message, Text
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.records import Record, Recorder, by_thirds, clustered_wilson, digest_of
from programmable_kv.scenarios.grammar import Scenario, other_value
from programmable_kv.scenarios.held_out import held_out_scenarios_per_domain
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.scenarios.vocabulary import held_out_domains
from programmable_kv.skills.skill import Skill

SEED = 66_000
LENGTHS = (1024, 2048, 4096)
"""Tokens of the timed policies."""
INSTANCES = 10
"""Policies of each held-out domain."""
TURNS = 6
"""Turns about each held-out policy."""
TIMED_TURNS = 12
MODES = (str(DEFAULT_MODE), str(Mode.ERRATUM))
"""Default modes of the agents. Times are those of the first mode. For agents in mode `readers` or `design`, the bench
declares the words by which the policy looks up a field."""
DESIGN = "design"
"""The agent with `visibility="design"`. Its policy is text of the context; other agents splice a compiled policy."""
OPENING = [("system", "")]
"""The preface behind which a policy is compiled and spliced: the beginning of a system message."""


@dataclass(frozen=True, slots=True)
class Step:
    """One turn: the changes before it, the request, and the right answer."""

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
    modes: Sequence[str] = MODES,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Measure decisions and times, and write them into one record."""
    drawn = policies(instances)
    recorder = Recorder(
        path,
        name=path.stem,
        version=3,
        title="An agent on a live cache against re-prefilling every turn",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(scenario.text() for scenario in drawn),
        seeds=[SEED],
        settings={
            "instances": instances,
            "domains": len(held_out_domains()),
            "turns": turns,
            "timed_turns": timed_turns,
            "lengths": list(lengths),
            "modes": list(modes),
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
                    "turns": play(
                        model,
                        scenario.prompt,
                        dict(scenario.values),
                        steps,
                        modes,
                        mentions={gate.field: [gate.kind] if gate.kind else [] for gate in scenario.gates},
                    ),
                }
            )
        if report is not None:
            report(number + 1, work)
    for number, length in enumerate(lengths):
        if not recorder.done(kind="time", length=length):
            policy, steps = padded_policy(model, length), list(_timed_steps(timed_turns))
            row = play(model, policy, dict(VALUES), steps, modes[:1], prefix_cache=True)
            recorder.add({"kind": "time", "length": length, "turns": row})
        if report is not None:
            report(len(drawn) + number + 1, work)
    return recorder.finish(summarise(recorder.rows, drawn))


def policies(instances: int) -> list[Scenario]:
    """The bench's held-out policies: `instances` for each domain that training does not use."""
    return held_out_scenarios_per_domain(instances, SEED)


def trajectory(scenario: Scenario, turns: int, rng: random.Random) -> Iterator[Step]:
    """Requests about a policy's gates. Before about half, the gate's field takes a value with another action."""
    values = dict(scenario.values)
    for _ in range(turns):
        gate = rng.choice(scenario.gates)
        changes = {}
        if rng.random() < 0.5:
            changes[gate.field] = other_value(rng, gate, values[gate.field])
            values |= changes
        asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
        yield Step(changes, asked, scenario.options, gate.actions[values[gate.field]])


def _timed_steps(turns: int) -> Iterator[Step]:
    """The demo's requests in turn. Before every second one, the request's field takes its other value."""
    values = dict(VALUES)
    for number in range(turns):
        case = CASES[number // 2 % len(CASES)]
        changes = {}
        if number % 2:
            changes[case.field] = case.value if values[case.field] != case.value else VALUES[case.field]
            values |= changes
        right = case.after if values[case.field] == case.value else case.before
        yield Step(changes, case.request, (case.before, case.after), right)


def play(
    model: Model, policy: str, state: dict[str, str], steps: list[Step], modes: Sequence[str], *,
    mentions: Mapping[str, Sequence[str]] | None = None, prefix_cache: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Play all turns with the rival and with an agent in each mode; returns a row for each turn.

    A row says which of them were right and which agreed with the rival, with the tokens computed and the milliseconds
    to the first answer token for the first agent and the rivals.

    Args:
        mentions: for each field, the words by which the policy refers to it.
        prefix_cache: whether the rival with a prefix cache plays too.
    """
    skill = Skill.compile(model, policy, state, name="policy", preface=OPENING)
    agents = {mode: _agent(model, skill, policy, state, mode, mentions or {}) for mode in modes}
    composing = agents[modes[0]].composed
    rival = Rival(model, policy, state)
    cached = Rival(model, policy, state, prefix_cache=True) if prefix_cache else None
    rows: list[dict[str, Any]] = []
    for number, step in enumerate(steps):
        theirs = rival.act(step)
        decided = {mode: agent.act(step.request, step.options, step.changes).decision for mode, agent in agents.items()}
        ours = decided[modes[0]]
        rows.append(
            {
                "changed": bool(step.changes),
                "right": theirs.choice == step.right,
                "modes": {
                    str(mode): {"right": one.choice == step.right, "agrees": one.choice == theirs.choice}
                    for mode, one in decided.items()
                },
                "agent_tokens": ours.account.tokens_computed + (composing.tokens_computed if number == 0 else 0),
                "rival_tokens": theirs.account.tokens_computed,
                "agent_ttft_ms": round(ours.ttft_ms + (1e3 * composing.seconds if number == 0 else 0), 2),
                "rival_ttft_ms": round(1e3 * theirs.account.seconds, 2),
            }
        )
        if cached is not None:
            account = cached.act(step).account
            rows[-1] |= {"cached_tokens": account.tokens_computed, "cached_ttft_ms": round(1e3 * account.seconds, 2)}
    return rows


def parse_way(way: str) -> str:
    """
    Raises:
        InvalidEditError: `way` is neither an edit mode nor `design`.
    """
    return way if way == DESIGN else str(parse_mode(way))


def _agent(
    model: Model, skill: Skill, policy: str, state: dict[str, str], mode: str, mentions: Mapping[str, Sequence[str]]
) -> Agent:
    if mode == DESIGN:
        return Agent(model, policy, state, visibility=Visibility.DESIGN, mentions=mentions)
    agent = Agent(model, skill, mode=mode)
    if mode == Mode.READERS:
        for name, words in mentions.items():
            agent.notebook.mentions(name, *words)
    return agent


class Rival:
    """An agent that renders its state into the system message and prefills everything in one forward, every turn.

    With `prefix_cache` it prefills from the first token that differs from the previous turn's context.
    """

    def __init__(self, model: Model, policy: str, state: Mapping[str, str], *, prefix_cache: bool = False) -> None:
        self.model, self.state = model, dict(state)
        self.messages = [Message("system", Text(policy, tuple(state)))]
        self.cached: KVBuffer | None = model.engine.new_buffer(64) if prefix_cache else None
        self.ids: list[int] = []

    def act(self, step: Step) -> _Answer:
        engine, tokenizer = self.model.engine, self.model.tokenizer
        self.state |= step.changes
        self.messages.append(Message("user", Text(step.request)))
        with engine.meter.measure() as reading:
            text = render_chat(ChatTemplate(tokenizer), self.messages, self.state, prompt_for_answer=True).text
            ids = tokenizer.encode(text, add_special_tokens=False)
            if self.cached is None:
                buffer, kept = engine.new_buffer(len(ids) + 64), 0
            else:
                buffer, kept = self.cached, _shared(self.ids, ids)
                buffer.truncate(kept)
            logits = engine.append(buffer, ids[kept:])
        self.ids = ids
        strings = option_ids(tokenizer, text, step.options, tokenizer.eos_token_id)
        choice = step.options[likeliest(engine, buffer, logits, strings)]
        self.messages.append(Message("assistant", Text(choice)))
        return _Answer(choice, reading.account)


def _shared(before: Sequence[int], now: Sequence[int]) -> int:
    """The number of tokens that two contexts share at their beginning, without the last one: its logits are needed."""
    for index, (old, new) in enumerate(zip(before, now[:-1], strict=False)):
        if old != new:
            return index
    return min(len(before), len(now) - 1)


@dataclass(frozen=True, slots=True)
class _Answer:
    choice: str
    account: Account


def summarise(rows: list[dict[str, Any]], drawn: Sequence[Scenario]) -> dict[str, Any]:
    """Rates of right answers and of agreement by mode, for all policies and for those with one set of rules; and ratios
    of summed times and tokens.

    Agreement is counted where the rival is right, `agreement_on_all` everywhere. The turns of one policy are not
    independent, so the intervals allow for policies.
    """
    decided = [row for row in rows if row["kind"] == "decisions"]
    single = [row for row in decided if len(drawn[row["policy"]].gates) == 1]
    summary = _decisions(decided) | {"one_rule_set": _decisions(single)}
    for row in rows:
        if row["kind"] == "time":
            sums = {
                key: sum(turn[key] for turn in row["turns"])
                for key in row["turns"][0]
                if key.endswith(("_ttft_ms", "_tokens"))
            }
            summary[f"at_{row['length']}"] = {
                "rival_over_agent_ttft": round(sums["rival_ttft_ms"] / sums["agent_ttft_ms"], 2),
                "cached_over_agent_ttft": round(sums["cached_ttft_ms"] / sums["agent_ttft_ms"], 2),
                "rival_over_agent_tokens": round(sums["rival_tokens"] / sums["agent_tokens"], 2),
                "cached_over_agent_tokens": round(sums["cached_tokens"] / sums["agent_tokens"], 2),
                "agent_seconds": round(sums["agent_ttft_ms"] / 1e3, 2),
                "rival_seconds": round(sums["rival_ttft_ms"] / 1e3, 2),
                "turns": len(row["turns"]),
            }
    return summary


def _decisions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rates over all turns, and if there are enough, over the first, middle and last third of each conversation."""
    plays: list[list[dict[str, Any]]] = [row["turns"] for row in rows]
    if not plays or any(len(turns) < 3 for turns in plays):
        return _rates(plays)
    return _rates(plays) | {"thirds": {name: _rates(turns) for name, turns in by_thirds(plays).items()}}


def _rates(plays: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The rates over these turns. If the rival is never right, there is no decision to agree with, and no figure."""
    part: dict[str, Any] = {"decisions": sum(map(len, plays))}
    right = [[turn for turn in turns if turn["right"]] for turns in plays]
    changed = [[turn for turn in turns if turn["changed"]] for turns in right]
    if plays:
        part["rival_right"] = _rate([[turn["right"] for turn in turns] for turns in plays])
    modes = list(plays[0][0]["modes"]) if plays else []
    for mode in modes:
        counts = (
            ("agreement", "agrees", right),
            ("agreement_after_a_change", "agrees", changed),
            ("agreement_on_all", "agrees", plays),
            ("right", "right", plays),
        )
        part[mode] = {
            name: _rate([[turn["modes"][mode][what] for turn in turns] for turns in counted if turns])
            for name, what, counted in counts
            if any(counted)
        }
    return part


def _rate(turns_of_policies: list[list[bool]]) -> dict[str, Any]:
    return clustered_wilson(turns_of_policies).model_dump()
