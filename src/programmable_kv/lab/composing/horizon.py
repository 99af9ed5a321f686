"""Does a cache drift if it is edited again and again? One live context: an early field changes each turn, a tail grows.

The field takes one of two other values, each with an action of its own, so that "not the last one" does not give the
answer.

Every turn is compared with a full prefill of the policy with its current values and the same conversation. (Appending
the same tokens to both would be equal by causality, and prove nothing.) Both conversations go on with the right answer,
whatever each decided.
"""

from __future__ import annotations

import math
import random
from typing import Any

from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.scenarios.grammar import make_scenario, other_value
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.scenarios.vocabulary import held_out_domains

SEED = 44_000


def play(model: Model, number: int, turns: int) -> list[dict[str, Any]]:
    """One held-out policy's turns: each sets the field to a value that decides otherwise, and asks about its topic."""
    trades = held_out_domains()
    rng = random.Random(f"{SEED}/{number}")
    scenario = make_scenario(
        rng, "held_out", domain=trades[number % len(trades)], gates=1, two_hop=False, gated_values=3
    )
    values, gate = dict(scenario.values), scenario.gates[0]
    live = Notebook(model).message("system", scenario.prompt, **values)
    live.prefill()
    said: list[tuple[str, str]] = []
    rows: list[dict[str, Any]] = []
    for turn in range(turns):
        values[gate.field] = other_value(rng, gate, values[gate.field])
        said.append(("user", question(rng, PHRASINGS["held_out"], gate.topic, think=False)))
        live.edit({gate.field: values[gate.field]})
        live.add(*said[-1])
        ours = live.decide(None, scenario.options)
        whole = Notebook(model).message("system", scenario.prompt, **values)
        for role, content in said:
            whole.message(role, content)
        whole.prefill()
        theirs = whole.decide(None, scenario.options)
        right = gate.actions[values[gate.field]]
        rows.append(
            {
                "turn": turn,
                "tokens": len(live),
                "full_tokens": len(whole),
                "right": theirs.choice == right,
                "live_right": ours.choice == right,
                "agrees": ours.choice == theirs.choice,
                "kl": round(_divergence(ours, theirs), 6),
            }
        )
        said.append(("assistant", right))
        live.add(*said[-1])
    return rows


def _divergence(found: Decision, expected: Decision) -> float:
    """Kullback-Leibler divergence over the options, in nats."""
    return sum(
        p * (math.log(p) - math.log(max(found.probabilities[option], 1e-300)))
        for option, p in expected.probabilities.items()
        if p > 0
    )
