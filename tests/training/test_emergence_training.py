"""The first steps of training again, looked at in between, on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model, tokenizer
from training import emergence
from training.recipe import TrainingRecipe
from training.train import train

RECIPE = replace(TrainingRecipe(), conversations_per_step=1, warmup_steps=1, replay_tokens=32, learning_rate=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", dtype=torch.float32, max_position_embeddings=8192).save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    return folder


def test_it_is_the_recipes_own_training_and_is_looked_at_where_asked(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    record: Any = emergence.run(base, tmp_path / "run", tmp_path / "it.json", RECIPE, steps=(0, 1, 3), count=24)
    assert record.complete
    assert [row["step"] for row in record.rows] == [0, 1, 3]
    gaps = [[each["old_gap"] for each in row["policies"]] for row in record.rows]
    assert len(gaps[0]) == record.figure("at_0.policies") > 1
    assert gaps[0] != gaps[1] != gaps[2], "training changes what is decided"
    train(base, tmp_path / "straight", RECIPE, stop_after=3)
    curves = [
        json.loads((tmp_path / name / "training.json").read_text(encoding="utf-8"))["curve"]
        for name in ("run", "straight")
    ]
    assert [step for step, _, _ in curves[0]] == [0, 1, 2]
    for (_, interrupted, _), (_, straight, _) in zip(*curves, strict=True):
        assert interrupted == pytest.approx(straight, rel=0.05)
    assert record.rows[2]["loss"] == pytest.approx(sum(loss for _, loss, _ in curves[0]) / 3, abs=1e-4)
    again: Any = emergence.run(base, tmp_path / "run", tmp_path / "again.json", RECIPE, steps=(3,), count=24)
    assert again.rows[0]["policies"] == record.rows[2]["policies"], "what is trained already is not trained again"


def test_policies_are_of_two_rules_and_no_others() -> None:
    for case in emergence.drawn(16):
        rules = [line for line in case.scenario.prompt.splitlines() if case.gate.field in line and "{" not in line]
        assert len(case.gate.actions) == 2
        assert sum(any(action in line for action in case.gate.actions.values()) for line in rules) >= 2


def test_competence_is_the_first_step_that_is_right_often_enough() -> None:
    def row(step: int, right: int) -> dict[str, Any]:
        policies = [
            {"domain": "ab"[n % 2], "valid": n < right, "old_gap": -1.0, "new_gap": 1.0, "patched": {"field": -1.0}}
            for n in range(10)
        ]
        return {"step": step, "policies": policies, "read": {}}

    found = emergence.summarise([row(0, 0), row(5, 8), row(9, 10)])
    assert found["competent_from"] == 5
    assert found["at_9"]["right"]["value"] == 1.0
    assert found["at_9"]["kept"]["value"] == 1.0
    assert "competent_from" not in emergence.summarise([row(0, 3)])
