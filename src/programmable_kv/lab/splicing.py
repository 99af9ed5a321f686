"""Does a spliced skill decide as a full prefill would? By seam, by displacement, with and without rotation, held out.

A held-out policy with its fields is compiled alone and spliced behind a prefix of other text; a question follows. Two controls
must fail where they should: keys that are not rotated, and a *coupled* skill, whose rules depend on a value that stands in
the prefix and which it therefore never read. Agreement counts only where full prefill is right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from programmable_kv.adapter.evaluate import scenarios
from programmable_kv.adapter.grammar import FILLERS, PHRASINGS, Scenario, question
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.engine import Rows
from programmable_kv.model import Model
from programmable_kv.notebook.decision import best_of, option_ids, score
from programmable_kv.notebook.skill import Skill
from programmable_kv.records import Record, Recorder, bootstrap_mean, digest_of, wilson

SEED = 99_000
SEAMS = (0, 1, 4, 16, 32)
DISPLACEMENTS = (64, 512)
"""tokens of other text before the skill"""


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Splice `count` held-out policies in every way, and compare with full prefill."""
    drawn = scenarios(count, seed=SEED)
    recorder = Recorder(
        path,
        name="splice-agreement",
        version=1,
        title="A spliced policy against a full prefill, by seam and displacement",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(scenario.text() for scenario in drawn),
        seeds=[SEED],
        settings={"scenarios": count, "seams": list(SEAMS), "displacements": list(DISPLACEMENTS)},
    )
    for index, scenario in enumerate(drawn):
        for displacement in DISPLACEMENTS:
            if not recorder.done(scenario=index, displacement=displacement):
                found = _one(model, scenario, index, displacement)
                recorder.add({"scenario": index, "domain": scenario.domain, "displacement": displacement, **found})
        if report is not None:
            report(index + 1, count)
    return recorder.finish(summarise(recorder.rows))


def _one(model: Model, scenario: Scenario, index: int, displacement: int) -> dict[str, Any]:
    rng = random.Random(f"{SEED}/{index}/{displacement}")
    gate = rng.choice(scenario.gates)
    asked = question(rng, PHRASINGS["held_out"], gate, think=False)
    tail = model.tokenizer.encode(
        f"<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    layout = model.engine.require_relocation()
    unrotated = replace(layout, layers=tuple(replace(layer, rotary=None) for layer in layout.layers))
    prefix = _prefix(model, rng, displacement)
    text = scenario.text()
    skill = Skill.compile(model, text)
    case = _Case(model, scenario.options, gate.actions[scenario.values[gate.field]], tail)
    full, expected = case.full(prefix + list(skill.unit.ids))
    arms: dict[str, dict[str, Any]] = {}
    for seam in SEAMS:
        arms[f"seam_{seam}"] = case.spliced(prefix, skill, layout, seam, expected, full["choice"])
    arms["not_rotated"] = case.spliced(prefix, skill, unrotated, 4, expected, full["choice"])
    # Coupled: the facts stand in the prefix, and the skill holds only the rules.
    facts, _, rules = text.partition("\n\n")[2].partition("\n\n")
    before = prefix + model.tokenizer.encode(facts + "\n\n", add_special_tokens=False)
    rules_skill = Skill.compile(model, rules)
    coupled, coupled_logits = case.full(before + list(rules_skill.unit.ids))
    arms["coupled"] = case.spliced(before, rules_skill, layout, 4, coupled_logits, coupled["choice"])
    return {"full": full, "coupled_full": coupled, "tokens": len(skill), **arms}


def _prefix(model: Model, rng: random.Random, tokens: int) -> list[int]:
    """Other text, as many tokens as asked for."""
    lines = list(FILLERS["held_out"])
    rng.shuffle(lines)
    text = "<|im_start|>system\n" + "\n".join(lines * (1 + tokens // 40))
    ids: list[int] = model.tokenizer.encode(text, add_special_tokens=False)
    return [*ids[: tokens - 1], *model.tokenizer.encode("\n", add_special_tokens=False)]


class _Case:
    """One question about one policy, asked of differently made caches."""

    def __init__(self, model: Model, options: tuple[str, ...], right: str, tail: list[int]) -> None:
        self.model, self.options, self.right, self.tail = model, options, right, tail
        self.strings = option_ids(model.tokenizer, "assistant\n", options, model.tokenizer.eos_token_id)

    def full(self, ids: list[int]) -> tuple[dict[str, Any], torch.Tensor]:
        buffer = self.model.engine.new_buffer(len(ids) + 128)
        logits = self.model.engine.append(buffer, ids + self.tail)
        choice = self._choice(buffer, logits)
        return {"choice": choice, "right": choice == self.right}, logits[-1].double()

    def spliced(
        self, prefix: list[int], skill: Skill, layout: KVLayout, seam: int, expected: torch.Tensor, choice: str
    ) -> dict[str, Any]:
        engine = self.model.engine
        buffer = engine.new_buffer(len(prefix) + len(skill) + 128)
        engine.append(buffer, prefix, logits=0)
        start = buffer.length
        buffer.insert(start, skill.segment, layout)
        if seam:
            slots = tuple(range(start, start + min(seam, len(skill))))
            engine.compute(buffer, Rows(skill.unit.ids[: len(slots)], slots, slots), logits=0)
        logits = engine.append(buffer, self.tail)
        found = logits[-1].double()
        divergence = torch.nn.functional.kl_div(
            found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum"
        )
        return {
            "agrees": self._choice(buffer, logits) == choice,
            "cosine": round(float(torch.nn.functional.cosine_similarity(found, expected, dim=0)), 6),
            "kl": round(float(divergence), 6),
        }

    def _choice(self, buffer: KVBuffer, logits: torch.Tensor) -> str:
        scores = score(self.model.engine, buffer, logits, self.strings)
        return best_of(self.options, scores)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement (Wilson), median cosine and KL (bootstrap), for each displacement and way, where full prefill is right."""
    summary: dict[str, Any] = {}
    for displacement in DISPLACEMENTS:
        part: dict[str, Any] = {}
        for arm in (*(f"seam_{seam}" for seam in SEAMS), "not_rotated", "coupled"):
            full = "coupled_full" if arm == "coupled" else "full"
            right = [row for row in rows if row["displacement"] == displacement and row[full]["right"]]
            part[arm] = {
                "agreement": wilson(sum(row[arm]["agrees"] for row in right), len(right)).model_dump(),
                "cosine": bootstrap_mean([row[arm]["cosine"] for row in right], statistic="median").model_dump(),
                "kl": bootstrap_mean([row[arm]["kl"] for row in right], statistic="median").model_dump(),
            }
        summary[f"at_{displacement}"] = part
    return summary
