"""A run on a tiny random model: it learns, stops by steps or seconds, resumes to the same weights, and exports an adapter."""

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
from training.design import loop
from training.design.__main__ import main
from training.design.feeding import StepMaker, feed
from training.design.loop import Settings, run
from training.design.parts import Encoding
from training.design.recipe import DesignRecipe
from training.masters import Masters

ROOT = Path(__file__).parent.parent.parent
SHORT = DesignRecipe(
    steps=4, sequences_per_step=2, longest=900, learning_rate=1e-3, warmup_steps=1, replay_windows=1, replay_tokens=32,
    averaged_share=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base model, and an adapter of it."""
    from peft import LoraConfig, get_peft_model

    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    tiny_model("llama", dtype=torch.float32).save_pretrained(base)
    tokenizer("byte-level").save_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    from transformers import AutoModelForCausalLM

    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    return base, adapter


def settings(folders: tuple[Path, Path], out: Path) -> Settings:
    return Settings(base=folders[0], adapter=folders[1], out=out, score_count=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def summary(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "training.json").read_text(encoding="utf-8")))


def unsaid(line: str) -> None:
    """Print nothing."""


def test_a_resumed_run_ends_with_the_same_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    once, twice = settings(folders, tmp_path / "once"), settings(folders, tmp_path / "twice")
    run(once, SHORT, unsaid)
    run(replace(twice, stop_after=3), SHORT, unsaid)
    run(twice, SHORT, unsaid)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in weights(once.out).items() if "lora_B" in name)
    for name, tensor in weights(once.out).items():
        torch.testing.assert_close(tensor.float(), weights(twice.out)[name].float(), rtol=0.05, atol=2e-4)
    assert summary(once.out)["step"] == summary(twice.out)["step"] == 4
    assert summary(once.out)["averaged"] == summary(twice.out)["averaged"] == 2
    with pytest.raises(TrainingError, match="another recipe"):
        run(twice, replace(SHORT, seed=1), unsaid)
    with pytest.raises(TrainingError, match="already has 4 steps"):
        run(twice, SHORT, unsaid)


def test_what_is_exported_continues_the_adapter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Its shape and configuration; every learned weight moved, and none is far from where it was."""
    run(settings(folders, tmp_path), SHORT, unsaid)
    before, after = weights(folders[1]), weights(tmp_path)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name].to(torch.bfloat16), after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert (tmp_path / "adapter_config.json").read_text() == (folders[1] / "adapter_config.json").read_text()
    curve = summary(tmp_path)["curve"]
    assert isinstance(curve, list)
    assert [row[0] for row in curve] == [1, 2]
    assert all(math.isfinite(loss) for row in curve for loss in row[3].values())


def test_training_lowers_the_loss(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """On the same sequences: with a rate that learns, and one at which nothing is learned."""

    def last_loss(rate: float) -> float:
        recipe = replace(
            SHORT, steps=24, sequences_per_step=4, learning_rate=rate, replay_windows=0, longest=600,
            mixture=(("rule sets alone", 1.0),), averaged_share=0.0,
        )  # fmt: skip
        run(settings(folders, tmp_path / str(rate)), recipe, unsaid)
        curve = summary(tmp_path / str(rate))["curve"]
        assert isinstance(curve, list)
        return float(curve[-1][3]["rule sets alone"])

    assert last_loss(2e-2) < 0.9 * last_loss(1e-12)


def test_seconds_end_a_run(folders: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    recipe = replace(SHORT, seconds=1.5, warmup_steps=2)
    run(replace(settings(folders, tmp_path), light=True, checkpoint_seconds=0.0), recipe, said.append)
    found = summary(tmp_path)
    assert isinstance(found["seconds"], float)
    assert 1.5 <= found["seconds"] < 30
    assert not (tmp_path / "checkpoint.pt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "training.json",
    ]  # fmt: skip
    assert any(line.startswith("step 1, ") for line in said)


def test_the_rate_follows_the_share_of_steps_or_seconds() -> None:
    by_steps, by_seconds = DesignRecipe(steps=1000), DesignRecipe(seconds=100.0)
    assert by_steps.share(500, 9999.0) == by_seconds.share(1, 50.0) == 0.5
    assert by_seconds.share(1, 120.0) == 1.0
    assert by_steps.rate(0, 0.0) == pytest.approx(by_steps.learning_rate / 30)
    assert by_steps.rate(30, 0.0) == pytest.approx(by_steps.learning_rate)
    assert by_steps.rate(999, 1.0) == pytest.approx(by_steps.learning_rate / 20)


def test_scores_are_told_and_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    run(replace(settings(folders, tmp_path), score_count=1), replace(SHORT, steps=1), said.append)
    found = summary(tmp_path)["held_out"]
    assert isinstance(found, dict)
    assert found["before"]["answers"]["6 rule sets: alone"]["n"] == 1
    assert found["after"]["perplexity_ratio"] > 0
    assert any("before     after" in line for line in said)


def test_a_failed_score_costs_no_weights(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(loop, "scores", fail)
    monkeypatch.setattr(loop, "feed", lambda make, numbers, workers: map(make, numbers))
    said: list[str] = []
    run(replace(settings(folders, tmp_path), score_count=1), replace(SHORT, steps=1), said.append)
    assert weights(tmp_path)
    assert any("scores after: failed, RuntimeError: no memory" in line for line in said)


def test_a_failed_step_costs_no_weights(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[int] = []

    def divergence(*_: object) -> torch.Tensor:
        replayed.append(1)
        if len(replayed) == 3:
            raise RuntimeError("no memory")
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(loop, "divergence", divergence)
    with pytest.raises(RuntimeError, match="no memory"):
        run(settings(folders, tmp_path), replace(SHORT, steps=6), unsaid)
    assert weights(tmp_path)
    assert summary(tmp_path)["step"] == 4  # two of the steps had plain text to replay, and the third such failed


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = Masters([weight])
    weight.grad = torch.tensor([1.0, float("nan"), 1.0], dtype=torch.bfloat16)
    assert not masters.step(0.1, 1.0)
    assert torch.equal(weight, torch.ones(3, dtype=torch.bfloat16))
    weight.grad = torch.ones(3, dtype=torch.bfloat16)
    assert masters.step(0.1, 1.0)
    assert (weight < 1).all()


def test_workers_make_what_one_process_makes() -> None:
    make = StepMaker(SHORT, Encoding(tokenizer("byte-level")), 4096)
    here, there = (list(feed(make, range(3, 6), workers)) for workers in (0, 2))
    assert [data.step for data in here] == [data.step for data in there] == [3, 4, 5]
    for one, other in zip(here, there, strict=True):
        assert [batch.ids.tolist() for batch in one.batches] == [batch.ids.tolist() for batch in other.batches]
        assert (one.replayed is None) == (other.replayed is None) == (one.step % 2 == 1)


def test_the_command_trains_and_refuses(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = map(str, folders)
    command = [
        "--out", str(tmp_path), "--base", base, "--adapter", adapter, "--device", "cpu", "--steps", "2", "--score-count", "0",
        "--sequences-per-step", "2", "--longest", "900", "--replay-windows", "0",
    ]  # fmt: skip
    assert main(command) == 0
    assert "step 2, " in capsys.readouterr().out
    assert weights(tmp_path)
    assert main(command) == 1
    assert "nothing left to train" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--steps", "0"])


def test_families_replace_the_mixture(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = map(str, folders)
    command = [
        "--out", str(tmp_path / "out"), "--base", base, "--adapter", adapter, "--device", "cpu", "--steps", "1",
        "--score-count", "0", "--sequences-per-step", "2", "--longest", "900", "--replay-windows", "0",
    ]  # fmt: skip
    families = ["--family", "updates alone=3", "--family", "facts alone=1"]
    for refused, told in (
        ("lies alone=1", "does not name"), ("facts alone", "does not name"), ("rule sets alone=0", "above zero"),
        ("rule sets alone=much", "above zero"), ("rule sets alone=nan", "above zero"), ("facts alone=1", "twice"),
    ):  # fmt: skip
        assert main([*command, *families, "--family", refused]) == 1
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main([*command, *families]) == 0
    found = summary(tmp_path / "out")
    assert isinstance(found["recipe"], dict)
    assert found["recipe"]["mixture"] == [["updates alone", 0.75], ["facts alone", 0.25]]
    assert isinstance(found["curve"], list)
    assert set(found["curve"][0][3]) <= {"updates alone", "facts alone"}


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "training.design", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--light-checkpoints" in done.stdout
