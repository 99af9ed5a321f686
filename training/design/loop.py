"""The run: scores held-out answers, trains until the schedule is over, exports the adapter, and scores again."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from programmable_kv.errors import TrainingError
from programmable_kv.scenarios.plain_text import documents
from programmable_kv.scenarios.vocabulary import english
from training.design import model as adapters
from training.design.batches import divergence, moved, predicted
from training.design.chat_format import ChatFormat
from training.design.feeding import StepData, StepMaker, feed
from training.design.parts import Encoding
from training.design.progress import resume, save
from training.design.recipe import DesignRecipe
from training.design.replay import held_out_windows, perplexity_ratio
from training.design.scores import CaseMaker, scores, table
from training.design.whole import whole_layers
from training.masters import Masters

_REPORTED = (1, 2, 5, 10, 20)
_REPORT_EVERY = 50
_MOST_STEPS = 1_000_000
_TEXT_WINDOWS = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how fast a run computes.

    Only `base`, `adapter` and `stop_after` determine the weights. The other settings change them only by rounding; if
    the recipe counts seconds, also by the number of steps.
    """

    base: Path
    adapter: Path
    """folder of the adapter from which training continues"""
    out: Path
    device: str = "cpu"
    workers: int = 0
    tokens_per_pass: int = 2048
    score_count: int = 24
    """held-out cases in each arm; 0: no scores"""
    checkpoint_seconds: float = 60.0
    light: bool = False
    """whether checkpoints are only the adapter's file, which is small but cannot be resumed"""
    stop_after: int | None = None
    """stop at this step of the schedule"""


def run(settings: Settings, recipe: DesignRecipe, say: Callable[[str], None] = print) -> Path:
    """Train, or resume training.

    Returns:
        The folder with the adapter's weights, its configuration and `training.json`.

    Raises:
        TrainingError: the folder has a checkpoint of another recipe or a finished run, or the model cannot be trained.
    """
    return _Run(settings, recipe, say).run()


class _Run:
    def __init__(self, settings: Settings, recipe: DesignRecipe, say: Callable[[str], None]) -> None:
        self._settings, self._recipe, self._say = settings, recipe, say
        torch.manual_seed(recipe.seed)
        device = torch.device(settings.device)
        if device.type == "cuda":
            # cuDNN builds a plan for every new shape, and here every step has a new shape.
            torch.backends.cuda.enable_cudnn_sdp(False)
        began = time.perf_counter()
        self._earlier = adapters.earlier_runs(settings.adapter)
        self._model, tokenizer = adapters.load(settings.base, settings.adapter, device)
        self._encoding = Encoding(tokenizer, ChatFormat.of(tokenizer))
        self._masters = Masters(adapters.trained(self._model))
        self._whole = whole_layers(self._model)
        settings.out.mkdir(parents=True, exist_ok=True)
        self._progress = resume(settings.out, self._masters, recipe, device)
        self._merge()
        # Read these once, before worker processes are forked. Otherwise each process would read them again.
        documents("replay", 200, packages=True)
        english()
        self._families = {family: row for row, (family, _) in enumerate(recipe.mixture)}
        self._losses = torch.zeros(len(self._families), 2, device=device)
        self._divergences: list[torch.Tensor] = []
        self._cases: list[Any] = []
        say(f"model and text ready in {time.perf_counter() - began:.0f} s, on {device}")

    def run(self) -> Path:
        progress, out = self._progress, self._settings.out
        if self._over():
            raise TrainingError(f"{out} already has {progress.step} steps; there is nothing left to train")
        if not progress.step:
            progress.before = self._scored("before")
        try:
            self._train()
        except Exception as error:  # keep what was learned so far
            self._say(f"step {progress.step}: failed, {type(error).__name__}: {error}")
            self._export({})
            raise
        self._publish_mean()
        self._export({})
        after = self._scored("after")
        self._export(after)
        if progress.before.get("answers") and after.get("answers"):
            self._say(table(before=progress.before["answers"], after=after["answers"]))
        return out

    def _train(self) -> None:
        recipe, progress, settings = self._recipe, self._progress, self._settings
        last = settings.stop_after or (_MOST_STEPS if recipe.seconds is not None else recipe.steps)
        made = feed(
            StepMaker(recipe, self._encoding, settings.tokens_per_pass), range(progress.step, last), settings.workers
        )
        began, saved = time.perf_counter() - progress.seconds, time.perf_counter()
        reported = progress.step, progress.seconds
        for data in made:
            self._step(data)
            progress.seconds = time.perf_counter() - began
            if progress.step in _REPORTED or progress.step % _REPORT_EVERY == 0:
                self._report(*reported)
                reported = progress.step, progress.seconds
            if self._over():
                break
            if time.perf_counter() - saved > settings.checkpoint_seconds:
                self._checkpoint()
                saved = time.perf_counter()
        self._checkpoint()

    def _step(self, data: StepData) -> None:
        """Take one optimizer step on a step's sequences and plain text."""
        recipe, progress = self._recipe, self._progress
        learned = sum(int(batch.learned[:, 1:].sum()) for batch in data.batches)
        for batch in data.batches:
            said = predicted(self._model, batch)
            (said.loss.sum() / learned).backward()  # type: ignore[no-untyped-call]
            rows = moved(np.asarray([self._families[family] for family in batch.families]), said.row.device)
            counted = torch.stack((said.loss.detach(), torch.ones_like(said.loss)), dim=1)
            self._losses.index_add_(0, rows[said.row], counted)
        if data.replayed is not None:
            distance = divergence(self._model, data.replayed)
            (recipe.replay_weight * distance).backward()  # type: ignore[no-untyped-call]
            self._divergences.append(distance.detach())
        for layer in self._whole:
            layer.fold_gradient()
        share = recipe.share(progress.step, progress.seconds)
        if not self._masters.step(recipe.rate(progress.step, share), recipe.max_gradient_norm):
            progress.skipped += 1
        if share >= 1 - recipe.averaged_share:
            progress.average(self._masters.tensors)
        self._merge()
        progress.step += 1

    def _over(self) -> bool:
        progress, stop = self._progress, self._settings.stop_after
        return self._recipe.share(progress.step, progress.seconds) >= 1 or (stop is not None and progress.step >= stop)

    def _report(self, since_step: int, since: float) -> None:
        progress = self._progress
        sums = self._losses.tolist()
        losses = {
            family: round(sums[row][0] / sums[row][1], 4) for family, row in self._families.items() if sums[row][1]
        }
        text = float(torch.stack(self._divergences).mean()) if self._divergences else 0.0
        self._losses.zero_()
        self._divergences.clear()
        progress.curve.append([progress.step, round(progress.seconds, 1), round(text, 4), losses])
        speed = (progress.step - since_step) / max(1e-9, progress.seconds - since)
        memory = ""
        if self._model.device.type == "cuda":
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak"
        self._say(
            f"step {progress.step}, {progress.seconds:.0f} s, {speed:.2f} steps/s, "
            f"{speed * self._recipe.sequences_per_step:.0f} sequences/s{memory}; text {text:.4f}; "
            + ", ".join(f"{family} {loss:.3f}" for family, loss in losses.items())
            + (f"; {progress.skipped} steps skipped" if progress.skipped else "")
        )

    def _checkpoint(self) -> None:
        if self._settings.light:
            adapters.write(self._model, self._settings.adapter, self._settings.out)
            self._write_summary({})
        else:
            save(self._settings.out, self._masters, self._recipe, self._progress)

    def _publish_mean(self) -> None:
        """Set the model's weights to the mean of the last ones."""
        if self._progress.averaged:
            with torch.no_grad():
                for weight, mean in zip(adapters.trained(self._model), self._progress.mean, strict=True):
                    weight.copy_(mean)
            self._merge()

    def _merge(self) -> None:
        """On a GPU, compute the merged weights again after the adapter changed."""
        for layer in self._whole:
            layer.merge_whole()

    def _export(self, after: dict[str, Any]) -> None:
        adapters.write(self._model, self._settings.adapter, self._settings.out)
        self._write_summary(after)

    def _write_summary(self, after: dict[str, Any]) -> None:
        progress = self._progress
        summary = {
            "recipe": asdict(self._recipe), "step": progress.step, "seconds": round(progress.seconds, 1),
            "skipped": progress.skipped, "averaged": progress.averaged, "device": self._model.device.type,
            "python": platform.python_version(), "torch": torch.__version__,
            "held_out": {"before": progress.before, "after": after}, "earlier": self._earlier,
            "columns": ["step", "seconds", "divergence", "loss_by_family"], "curve": progress.curve,
        }  # fmt: skip
        (self._settings.out / adapters.SUMMARY).write_text(json.dumps(summary) + "\n", encoding="utf-8")

    def _scored(self, when: str) -> dict[str, Any]:
        """Return held-out scores. A failure here is reported and does not end the run."""
        settings, began = self._settings, time.perf_counter()
        if not settings.score_count:
            return {}
        try:
            if not self._cases:
                maker = CaseMaker(self._encoding, settings.score_count, settings.tokens_per_pass)
                self._cases = list(feed(maker, range(maker.chunks), settings.workers))
            answers = scores(self._model, self._cases)
            count = min(_TEXT_WINDOWS, settings.score_count)
            text = held_out_windows(self._encoding, count, self._recipe.replay_tokens)
            ratio = perplexity_ratio(self._model, text, self._recipe.replay_windows or 1)
        except Exception as error:  # no failed score should end hours of training
            self._say(f"scores {when}: failed, {type(error).__name__}: {error}")
            return {"failed": f"{type(error).__name__}: {error}"}
        self._say(f"scores {when}, in {time.perf_counter() - began:.0f} s; perplexity {ratio:.4f} of the base's")
        self._say(table(**{when: answers}))
        return {"answers": answers, "perplexity_ratio": round(ratio, 4)}
