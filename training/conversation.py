"""Makes the examples on which the adapter is trained from scenarios.

One example is a conversation about one policy: several questions, with state updates in between. An update
must be obeyed (the last one wins) or makes no difference. Several supervised decisions share one policy, so a
token of prefill teaches more. Only the assistant's tokens have a loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from programmable_kv.scenarios.grammar import Gate, Scenario, make_scenario, other_value
from programmable_kv.scenarios.phrasings import Phrasing, Split, Stage, phrasing_of, question, update


class Encoder(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


FULL_SHARE: dict[Stage, float] = {"hop": 0.12, "topics": 0.12, "hard": 0.25}
"""share of the conversations of a narrow late stage that come from the full mixture"""

GATE_WEIGHTS: dict[Stage, tuple[int, int, int, int]] = {
    "settle": (11, 4, 3, 2), "obey": (9, 8, 2, 1), "looked_up": (14, 4, 1, 1),
}  # fmt: skip
"""relative frequencies of policies with one, two, three and four gates"""
FIRST_UPDATE_SHARE: dict[Stage, float] = {"settle": 0.85, "obey": 0.85, "looked_up": 0.85}
"""share of conversations that open with updates; a lone first update was obeyed less often than the last of several"""
REWRITTEN_SHARE: dict[Stage, float] = {"settle": 0.25, "obey": 0.1, "looked_up": 0.1}
"""share of conversations whose policy shows the current values, followed by answers to earlier values"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text. `learned` marks text that the assistant must learn to write."""

    text: str
    learned: bool = False


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """Token ids, and for each token whether it counts in the loss."""

    ids: list[int]
    learned: list[bool]


def _message(role: str, content: str) -> Piece:
    return Piece(f"<|im_start|>{role}\n{content}<|im_end|>\n")


def conversation(
    rng: random.Random, split: Split = "train", *, stage: Stage = "full", words: Sequence[str] | None = None
) -> list[Piece]:
    """Draw a scenario and a conversation about it (ChatML, or plain text for one in eight).

    Training goes through the stages in order. After 80 steps on only the full mixture, the loss was still at the
    plateau of guessing an option. The model learns to look a rule up when there is little else in the context, and then
    does so in longer contexts. The same is true of choosing between two sets of rules by topic.
    """
    phrasing = phrasing_of(split, stage)
    if stage in FULL_SHARE and rng.random() < FULL_SHARE[stage]:
        stage = "full"
    draw = partial(make_scenario, rng, split, words=words)
    late = stage in ("hop", "full", "topics", "hard", *GATE_WEIGHTS)
    if stage == "pair":
        scenario = draw(fillers=0, gates=1, two_hop=False, gated_values=2, stage=stage)
        count = 1
    elif stage == "short":
        scenario = draw(fillers=rng.randint(0, 3), gates=1, two_hop=False, stage=stage)
        count = rng.randint(2, 3)
    elif stage == "hop":
        told_apart = 2 if rng.random() < 0.5 else None
        scenario = draw(
            fillers=0,
            gates=1,
            two_hop=True,
            gated_values=told_apart,
            ordered=rng.random() < 0.6,
            stage=stage,
        )
        count = rng.randint(2, 4)
    elif stage == "topics":
        told_apart = 2 if rng.random() < 0.4 else None
        fillers = rng.randint(0, 2)
        scenario = draw(fillers=fillers, gates=2, gated_values=told_apart, stage=stage)
        count = rng.randint(4, 7)
    elif stage == "hard":
        gates, fillers = rng.randint(1, 2), min(12, int(rng.expovariate(1 / 3)))
        told_apart = 2 if gates == 2 and rng.random() < 0.5 else None
        two_hop = True if gates == 1 else None
        scenario = draw(fillers=fillers, gates=gates, two_hop=two_hop, gated_values=told_apart, stage=stage)
        count = rng.randint(5, 9)
    elif stage in GATE_WEIGHTS:
        gates = rng.choices((1, 2, 3, 4), weights=GATE_WEIGHTS[stage])[0]
        two_hop = rng.random() < (0.75 if stage == "looked_up" else 0.5) if gates == 1 else None
        scenario = draw(gates=gates, two_hop=two_hop, stage=stage)
        count = gates + rng.randint(1, 3) if stage == "settle" else rng.randint(2, 4)
    else:
        scenario, count = draw(stage=stage), rng.randint(3, 6)
    if stage in REWRITTEN_SHARE and rng.random() < REWRITTEN_SHARE[stage]:
        return _rewritten(rng, phrasing, scenario, count + 2)
    if rng.random() < 0.12:
        return _plain(rng, phrasing, scenario, count)
    pieces = [_message("system", scenario.text())]
    values = dict(scenario.values)
    for turn in range(count):
        gate = rng.choice(scenario.gates)
        think = rng.random() < (0.15 if late else 0.3) and stage != "pair"
        asked = question(rng, phrasing, gate.topic, think=think)
        opens = stage in ("obey", "looked_up") and not turn
        lines = (
            _updates(rng, phrasing, scenario, gate, values, single=opens and rng.random() < 0.75)
            if turn
            or (rng.random() < FIRST_UPDATE_SHARE.get(stage, 0.5 if late else 0.35) and stage not in ("pair", "short"))
            else []
        )
        where = rng.random()
        if where < 0.45 or not lines:
            pieces += [_message("system", line) for line in lines]
            pieces.append(_message("user", asked))
        elif where < 0.8:
            pieces.append(_message("user", asked))
            pieces += [_message("system", line) for line in lines]
        else:
            pieces.append(_message("user", "\n".join([*lines, asked])))
        answer = gate.thought(values[gate.field]) if think else gate.actions[values[gate.field]]
        pieces += _answer(answer)
    return pieces


def _rewritten(rng: random.Random, phrasing: Phrasing, scenario: Scenario, count: int) -> list[Piece]:
    """Draw a conversation whose policy shows the current values, while earlier answers were right for earlier values.

    An agent that writes its state into the system message sees such conversations. Only answers that are right for the
    shown values are learned.
    """
    values = dict(scenario.values)
    turns: list[tuple[str, Gate, str]] = []
    for _ in range(count):
        gate = rng.choice(scenario.gates)
        if rng.random() < 0.5:
            values[gate.field] = rng.choice([value for value in sorted(gate.actions) if value != values[gate.field]])
        turns.append((question(rng, phrasing, gate.topic, think=False), gate, gate.actions[values[gate.field]]))
    pieces = [_message("system", scenario.prompt.format_map(values))]
    for asked, gate, answer in turns:
        right = gate.actions[values[gate.field]] == answer
        pieces += [_message("user", asked), *_answer(answer, learned=right)]
    return pieces


def _answer(text: str, *, learned: bool = True) -> list[Piece]:
    return [Piece("<|im_start|>assistant\n"), Piece(f"{text}<|im_end|>", learned), Piece("\n")]


def _plain(rng: random.Random, phrasing: Phrasing, scenario: Scenario, count: int) -> list[Piece]:
    pieces = [Piece(scenario.text() + "\n")]
    values = dict(scenario.values)
    for turn in range(count):
        gate = rng.choice(scenario.gates)
        lines = _updates(rng, phrasing, scenario, gate, values) if turn else []
        asked = question(rng, phrasing, gate.topic, think=False)
        first, second = ("".join(f"\n{line}" for line in lines), f"\n{asked}")
        if rng.random() < 0.5:
            first, second = second, first
        pieces += [Piece(f"{first}{second}\nAction:"), Piece(f" {gate.actions[values[gate.field]]}\n", learned=True)]
    return pieces


def _updates(
    rng: random.Random,
    phrasing: Phrasing,
    scenario: Scenario,
    gate: Gate,
    values: dict[str, str],
    *,
    single: bool = False,
) -> list[str]:
    """Draw the update lines before a question, and apply them to `values`.

    With `single`, there is one line, which updates the field that decides the question.
    """
    if single:
        values[gate.field] = other_value(rng, gate, values[gate.field])
        return [update(rng, phrasing, gate.field, values[gate.field])]
    draw = rng.random()
    # Often update another gate's field. Otherwise the latest update would tell which rules the next question is about.
    about = rng.choice(scenario.gates) if rng.random() < 0.5 else gate
    names: list[str] = []
    if draw < 0.5:
        names = [about.field]
    elif draw < 0.65:
        names = [about.field] * rng.randint(2, 3)
    elif draw < 0.9 and scenario.irrelevant:
        names = [rng.choice(sorted(scenario.irrelevant))]
        if rng.random() < 0.4:
            names.insert(rng.randint(0, 1), about.field)
    elif draw < 0.95 and len(scenario.gates) > 1:
        names = [rng.choice(scenario.gates).field]
    by_field = {gate.field: gate for gate in scenario.gates}
    lines = []
    for name in names:
        choices = sorted(by_field[name].actions) if name in by_field else list(scenario.irrelevant[name])
        changed = [value for value in choices if value != values[name]]
        if not changed:
            continue
        # Prefer a value with another action: an update that does not change the action teaches nothing.
        if name in by_field:
            actions = by_field[name].actions
            telling = [value for value in changed if actions[value] != actions[values[name]]]
            changed = telling if telling and rng.random() < 0.8 else changed
        values[name] = rng.choice(changed)
        lines.append(update(rng, phrasing, name, values[name]))
    return lines


def encode(pieces: list[Piece], tokenizer: Encoder) -> TrainingExample:
    """Tokenise piece by piece, so that an answer's tokens never merge with the text before it, as in decoding."""
    ids: list[int] = []
    learned: list[bool] = []
    for piece in pieces:
        piece_ids = tokenizer.encode(piece.text, add_special_tokens=False)
        ids += piece_ids
        learned += [piece.learned] * len(piece_ids)
    return TrainingExample(ids, learned)
