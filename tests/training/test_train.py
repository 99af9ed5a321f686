"""Training end to end on a tiny random model: it learns, resumes to the same weights, and refuses another recipe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_model, tokenizer
from programmable_kv.errors import TrainingError
from training.adapter import main
from training.recipe import TrainingRecipe
from training.train import train

ROOT = Path(__file__).parent.parent.parent

SHORT = replace(
    TrainingRecipe(),
    pair_steps=1,
    short_steps=0,
    mixed_steps=0,
    wide_steps=0,
    hop_steps=1,
    full_steps=0,
    topics_steps=0,
    full_again_steps=0,
    hard_steps=0,
    settle_steps=1,
    obey_steps=1,
    looked_up_steps=1,
    conversations_per_step=1,
    warmup_steps=1,
    replay_tokens=32,
    settle_replay_tokens=32,
    learning_rate=1e-3,
)
"""a step of each kind: learned text, text drawn to the base, fresh starts, and the last stage"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_resumed_run_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    """Five steps at once, and one step, a stop and four more (bfloat16 on one machine)."""
    train(base, tmp_path / "once", SHORT)
    train(base, tmp_path / "twice", SHORT, stop_after=1)
    train(base, tmp_path / "twice", SHORT)
    once, twice = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert any(float(tensor.abs().max()) > 0 for name, tensor in once.items() if "lora_B" in name)
    for name, tensor in once.items():
        torch.testing.assert_close(tensor.float(), twice[name].float(), rtol=0.05, atol=2e-4)
    with pytest.raises(TrainingError, match="another recipe"):
        train(base, tmp_path / "twice", replace(SHORT, seed=1))
    with pytest.raises(TrainingError, match="already has 5 steps"):
        train(base, tmp_path / "twice", SHORT)


def test_a_changed_recipe_is_recorded(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, SHORT, stop_after=1)
    train(base, tmp_path, replace(SHORT, obey_learning_rate=1e-4), stop_after=2, change_recipe=True)
    summary = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert [each["until_step"] for each in summary["earlier"]] == [1]
    assert summary["earlier"][0]["recipe"]["obey_learning_rate"] == SHORT.obey_learning_rate
    assert summary["recipe"]["obey_learning_rate"] == 1e-4


def test_what_is_exported_is_the_mean_around_the_last_stage(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, SHORT)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    before, after = state["before_last"], state["adapter"]
    exported = weights(tmp_path)
    assert any(not torch.equal(before[name], after[name]) for name in exported)
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, ((before[name].float() + after[name].float()) / 2).to(torch.bfloat16))
    summary = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert summary["step"] == SHORT.steps == len(summary["curve"])
    assert all(math.isfinite(loss) for _, *losses in summary["curve"] for loss in losses)


def test_training_lowers_the_loss(base: Path, tmp_path: Path) -> None:
    """On the same conversations: with the recipe's rate, and with one at which nothing is learned."""

    def last_losses(rate: float) -> float:
        recipe = replace(SHORT, pair_steps=60, conversations_per_step=4, learning_rate=rate, cosine_steps=120)
        losses: list[float] = []
        train(base, tmp_path / str(rate), recipe, stop_after=60, report=lambda _, loss, __: losses.append(loss))
        return sum(losses[-20:])

    assert last_losses(5e-2) < 0.97 * last_losses(1e-12)


def test_an_exported_adapter_continues_where_a_cosine_begins(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, SHORT, stop_after=1)
    (tmp_path / "checkpoint.pt").unlink()
    train(base, tmp_path, SHORT, stop_after=2)
    assert json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["step"] == 2
    (tmp_path / "checkpoint.pt").unlink()
    longer = replace(SHORT, hop_steps=3)
    with pytest.raises(TrainingError, match="can only continue from steps"):
        train(base, tmp_path, longer)


def test_the_command_trains_resumes_and_refuses(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        status = main(["--out", str(tmp_path / "out"), "--base", str(base), *arguments])
        return status, capsys.readouterr().err

    status, said = run("--stop-after", "1")
    assert status == 0
    assert "step 1/1" in said
    status, said = run("--stop-after", "2")
    assert status == 0
    assert "step 2/2" in said
    assert "step 1/" not in said
    assert weights(tmp_path / "out")
    status, said = run("--seed", "1", "--stop-after", "3")
    assert status == 1
    assert "another recipe" in said
    with pytest.raises(SystemExit, match="2"):
        run("--stop-after", "0")


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "training.adapter", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--change-recipe" in done.stdout
