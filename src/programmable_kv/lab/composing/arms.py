"""Ways to get pieces into a cache after a prefix, and how their answers compare with those of a full prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from programmable_kv.cache.span import Span
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.engine import Rows
from programmable_kv.lab.composing.frame import Frame
from programmable_kv.lab.composing.tasks import Task
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import likeliest, option_ids
from programmable_kv.skills.skill import Skill


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to splice: which of each piece's tokens are recomputed, whether keys are rotated, and whether pieces are
    compiled behind their prefaces."""

    name: str
    repair: SeamRepair
    rotated: bool = True
    preface: bool = False


SEAMS = tuple(Arm(f"seam_{seam}", SeamRepair(seam)) for seam in (0, 1, 4, 16, 32))
NOT_ROTATED = Arm("not_rotated", SeamRepair(0), rotated=False)
"""The control: a splice with seam 0 as it would be if rotation did not matter."""
RULES = (
    Arm("deviation_15", SeamRepair(0, rule="deviation:15%")),
    Arm("influence_16", SeamRepair(0, rule="influence:16")),
)
PREFACE_ARMS = (Arm("preface_0", SeamRepair(0), preface=True), Arm("preface_4", SeamRepair(4), preface=True))
"""For tasks whose pieces have prefaces, like `_BOTH`."""
_BOTH = Arm("preface_influence_16", SeamRepair(0, rule="influence:16"), preface=True)
ALL_ARMS = (*SEAMS, NOT_ROTATED, *RULES, *PREFACE_ARMS, _BOTH)
FEW_ARMS = (*SEAMS[:3], NOT_ROTATED, *RULES, *PREFACE_ARMS, _BOTH)


@dataclass(frozen=True, slots=True)
class _Answer:
    choice: str
    logits: torch.Tensor
    """Logits of the answer's first token, [vocabulary], float64."""


class ArmComparison:
    """A cache with a frame's prefix. The pieces of each arm are put after it and removed again."""

    def __init__(self, model: Model, frame: Frame) -> None:
        self._model, self._frame = model, frame
        self._layout = model.engine.require_relocation()
        model.engine.require_rows(instead="On this model no seam can be repaired, so there is nothing to compare.")
        self._unrotated = replace(
            self._layout, layers=tuple(replace(layer, rotary=None, others=()) for layer in self._layout.layers)
        )
        self._buffer = model.engine.new_buffer(len(frame.before) + 1024)
        model.engine.append(self._buffer, frame.before, logits=0)

    def compare(self, tasks: Sequence[Task], arms: Sequence[Arm]) -> list[dict[str, Any]]:
        """Ask tasks about the same pieces of a full prefill and of every arm. Returns one row for each task."""
        buffer = self._buffer
        mark, length = buffer.mark(), buffer.length
        try:
            return self._compare(tasks, arms)
        finally:
            buffer.truncate(length)
            buffer.release(mark)  # frees the pieces too

    def _compare(self, tasks: Sequence[Task], arms: Sequence[Arm]) -> list[dict[str, Any]]:
        engine, buffer, first = self._model.engine, self._buffer, tasks[0]
        arms = [arm for arm in arms if first.prefaces or not arm.preface]
        skills = [Skill.compile(self._model, piece) for piece in first.pieces]
        informed = [
            Skill.compile(self._model, piece, preface=preface)
            for piece, preface in zip(first.pieces, first.prefaces, strict=bool(first.prefaces))
        ]
        if first.shared:
            engine.append(buffer, self._encode(first.shared), logits=0)
        start = buffer.length
        engine.append(buffer, [token for skill in skills for token in skill.unit.ids], logits=0)
        full = [self._answer(task) for task in tasks]
        rows: list[dict[str, Any]] = [
            {
                "kind": task.kind, "domain": task.domain, "pieces": len(skills), "tokens": sum(map(len, skills)),
                "right": answer.choice in task.right,
            }
            for task, answer in zip(tasks, full, strict=True)
        ]  # fmt: skip
        for arm in arms:
            buffer.truncate(start)
            for skill in informed if arm.preface else skills:
                self._splice(skill, arm)
            for row, task, expected in zip(rows, tasks, full, strict=True):
                row[arm.name] = _compared(self._answer(task), expected)
        return rows

    def _splice(self, skill: Skill, arm: Arm) -> None:
        engine, buffer = self._model.engine, self._buffer
        at = buffer.length
        buffer.insert(at, skill.segment, self._layout if arm.rotated else self._unrotated)
        slots = arm.repair.slots(engine, buffer, skill.unit.ids, Span(at, buffer.length))
        if slots:
            ids = tuple(skill.unit.ids[slot - at] for slot in slots)
            positions = tuple(buffer.positions[slots].tolist())
            engine.compute(buffer, Rows(ids, tuple(slots), positions), logits=0)

    def _answer(self, task: Task) -> _Answer:
        """The decision on the buffer's content. Leaves the buffer unchanged."""
        engine, buffer, length = self._model.engine, self._buffer, self._buffer.length
        tail = self._frame.after(task.request)
        logits = engine.append(buffer, self._encode(tail))
        tokenizer = self._model.tokenizer
        strings = option_ids(tokenizer, tail, task.options, tokenizer.eos_token_id)
        choice = task.options[likeliest(engine, buffer, logits, strings)]
        buffer.truncate(length)
        return _Answer(choice, logits[-1].cpu().double())

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.tokenizer.encode(text, add_special_tokens=False)
        return ids


def _compared(found: _Answer, expected: _Answer) -> dict[str, Any]:
    """Whether the decisions agree, and how alike the next token's logits are: cosine, and divergence in nats."""
    divergence = torch.nn.functional.kl_div(
        found.logits.log_softmax(-1), expected.logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    cosine = torch.nn.functional.cosine_similarity(found.logits, expected.logits, dim=0)
    return {
        "agrees": found.choice == expected.choice,
        "cosine": round(float(cosine), 6),
        "kl": round(float(divergence), 6),
    }
