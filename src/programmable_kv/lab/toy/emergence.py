"""Do notes appear before, with or after competence? Probes models that are trained from scratch, while they learn.

At each shown step, on held-out policies: how often the model is right, how far a decision moves when the field's value
changes, and what share of that distance each kind of keys and values carries alone. Also whether an update at the end
is obeyed on a cache whose field and notes are of the old value.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine
from programmable_kv.lab.tools.nulls import random_slots
from programmable_kv.lab.tools.readouts import SMALLEST_SPAN, gap
from programmable_kv.lab.tools.together import Probe, probed
from programmable_kv.lab.toy.policies import FIELD_SLOT, LENGTH, VALUES, ToyPolicy, draw
from programmable_kv.lab.toy.training import ToyRecipe, train
from programmable_kv.records import Record, Recorder, bootstrap_mean, digest_of

SEED = 97_000
PROBED = 32
"""Number of held-out policies, the same at every step and in every model."""
SETS = ("field", "names", "values", "actions", "ends", "tail", "later", "random_as_actions")
COMPETENT = 0.9
"""Share of the policies that a competent model gets right under both values."""


def run(
    recipe: ToyRecipe, seeds: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Train `seeds` models, probe each while it learns, and write one record of all."""
    policies = probed_policies()
    recorder = Recorder(
        path,
        name="emergence",
        version=2,
        title="When notes appear: toy models trained from scratch",
        command=command,
        model="toy decoder, trained from scratch",
        model_fingerprint=digest_of(str(value) for value in asdict(recipe).values()),
        data_digest=digest_of(str(policy.ids()) for policy in policies),
        seeds=list(range(seeds)),
        settings={"seeds": seeds, "probed": PROBED, **asdict(recipe)},
    )

    def row(seed: int) -> dict[str, Any]:
        steps: list[dict[str, Any]] = []
        train(recipe, seed, lambda step, model: steps.append({"step": step, **looked_at(Engine(model), policies)}))
        return {"seed": seed, "steps": steps}

    recorder.collect(list(range(seeds)), lambda seed: {"seed": seed}, row, report)
    return recorder.finish(summarise(recorder.rows, recipe.plain_steps))


def probed_policies() -> list[ToyPolicy]:
    """The policies that every model is probed on. None of them is ever trained on."""
    rng = random.Random(SEED)
    return [draw(rng, held_out=True) for _ in range(PROBED)]


@torch.no_grad()
def looked_at(engine: Engine, policies: Sequence[ToyPolicy]) -> dict[str, Any]:
    """A model's results on these policies: shares, and means in nats."""
    rows = [_one(engine, policy, number) for number, policy in enumerate(policies)]
    found: dict[str, Any] = {key: fmean(row[key] for row in rows) for key in ("right", "obeyed", "span")}
    found["moved"] = {name: fmean(row["moved"][name] for row in rows) for name in SETS}
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    return {k: round(v, 4) for k, v in value.items()} if isinstance(value, dict) else round(value, 4)


def _one(engine: Engine, policy: ToyPolicy, number: int) -> dict[str, Any]:
    other = policy.with_value((policy.value + 1) % VALUES)
    old, new = policy.right, other.right
    stale, fresh = cached(engine, policy), cached(engine, other)
    sets = slots_of(policy, number)
    token = policy.ids()[-1]
    logits = probed(engine, stale, token, [Probe(), *(Probe(sets[name]) for name in SETS)], fresh)
    last = probed(engine, fresh, token, [Probe()])[0]
    gaps = gap(logits, new, old).tolist()
    line = policy.updated(other.value)
    stale.truncate(LENGTH - 2 - len(policy.line()))
    told = engine.append(stale, [*line.line(), *policy.ids()[-2:]])[-1]
    return {
        "right": float(int(logits[0].argmax()) == old and int(last.argmax()) == new),
        "obeyed": float(int(told.argmax()) == new),
        "span": float(gap(last, new, old)) - gaps[0],
        "moved": {name: each - gaps[0] for name, each in zip(SETS, gaps[1:], strict=True)},
    }


def cached(engine: Engine, policy: ToyPolicy) -> KVBuffer:
    """A buffer with all tokens but the last, whose row decides."""
    buffer = engine.new_buffer(3 * LENGTH)
    engine.append(buffer, policy.ids()[:-1], logits=0)
    return buffer


def slots_of(policy: ToyPolicy, number: int) -> dict[str, tuple[int, ...]]:
    """Slots to patch: the field, later tokens by kind, all of them, and as many random ones as there are actions."""
    kinds = policy.slots()
    later = tuple(range(FIELD_SLOT + 1, LENGTH - 1))
    # In one stratum: with so few tokens, the nearest other token of an action would always be the end of its rule.
    drawn = random_slots(kinds["actions"], later, random.Random(f"{SEED}/{number}"), strata=1)
    return {"field": (FIELD_SLOT,), **kinds, "later": later, "random_as_actions": drawn}


def summarise(rows: Sequence[Mapping[str, Any]], plain_steps: int) -> dict[str, Any]:
    """Over the models: when they are competent, what carries the decision then, and how often updates are obeyed.

    `earliest`: the first step at which the field's value moves the decision at all. `first`: the first competent step.
    `untaught`: the last step before training draws updates. `end`: the last step. The last three are of competent models.
    """
    found: dict[str, Any] = {"models": len(rows), "plain_steps": plain_steps}
    marked: dict[str, list[Mapping[str, Any]]] = {"earliest": [], "first": [], "untaught": [], "end": []}
    most = []
    for row in rows:
        steps = row["steps"]
        moved = [step for step in steps if step["span"] >= SMALLEST_SPAN]
        able = [step for step in steps if step["right"] >= COMPETENT]
        marked["earliest"] += moved[:1]
        if able:  # a model that never learns the task has nothing to overrule
            marked["first"] += able[:1]
            marked["untaught"] += [step for step in steps if step["step"] == plain_steps]
            marked["end"] += steps[-1:]
        most += [max(shares(step)["field"] for step in moved)] if moved else []
    found["competent_models"] = len(marked["first"])
    found["obeying_models"] = sum(step["obeyed"] >= COMPETENT for step in marked["end"])
    for name, steps in marked.items():
        figures = {key: [step[key] for step in steps] for key in ("step", "right", "obeyed")}
        figures |= {key: [shares(step)[key] for step in steps] for key in SETS}
        found[name] = {key: bootstrap_mean(each).model_dump() for key, each in figures.items() if each}
    return found | ({"most_by_field": bootstrap_mean(most).model_dump()} if most else {})


def shares(step: Mapping[str, Any]) -> dict[str, float]:
    """By kind of token, the share of the distance between the two decisions that it carries."""
    return {name: moved / step["span"] for name, moved in step["moved"].items()}
