"""Train the adapter of `embedded-plain`: LoRA on generated conversations, with plain text replayed.

Run it as `python -m training.adapter --out FOLDER`. It resumes from the last checkpoint in FOLDER. The data of step
`n` depends only on (seed, n), so a resumed run gets the same data as an uninterrupted one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from programmable_kv.errors import TrainingError
from programmable_kv.scenarios.plain_text import documents
from training.checkpoint import CHECKPOINT, adapter_of, export, lora_config, resume, save
from training.conversation import TrainingExample, conversation, encode
from training.losses import distance_from_base, passes, summed_loss
from training.masters import Masters
from training.recipe import TrainingRecipe

_STEPS_PER_CHECKPOINT = 20


def train(
    base: Path,
    out: Path,
    recipe: TrainingRecipe,
    *,
    stop_after: int | None = None,
    change_recipe: bool = False,
    report: Callable[[int, float, float], None] | None = None,
) -> Path:
    """Train (or resume training) the adapter of the model in `base`.

    Args:
        base: a folder that `AutoModelForCausalLM` and `AutoTokenizer` can load.
        out: where checkpoints and the result go. A checkpoint there is resumed.
        stop_after: stop at this step of the recipe's schedule.
        change_recipe: continue from a checkpoint of another recipe. Earlier recipes are recorded with their last steps.
        report: called as `report(step, decision_loss, replay_loss)` after every step. Losses are in nats per token. In
            the last three stages, the second one is the divergence from the base on the replayed text.

    Returns:
        The folder with the adapter's weights, its configuration and `training.json`.

    Raises:
        TrainingError: the folder contains a checkpoint of another recipe, an exported adapter that cannot be resumed,
            or training that has already reached the last step; or a step's gradients are not finite.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, lora_config(recipe), autocast_adapter_dtype=False)
    model.train()
    masters = Masters([p for p in model.parameters() if p.requires_grad])
    out.mkdir(parents=True, exist_ok=True)
    progress = resume(out, model, masters, recipe, change_recipe=change_recipe)
    last = min(recipe.steps, stop_after or recipe.steps)
    if progress.step >= last:
        raise TrainingError(f"{out} already has {progress.step} steps; there is nothing to train up to step {last}")
    gradients = Gradients(model, tokenizer, recipe)
    began = time.perf_counter() - progress.seconds
    for step in range(progress.step, last):
        if step in recipe.fresh_starts:
            masters.restart()
        if step == recipe.fresh_starts[-1]:
            progress.before_last = adapter_of(model)
        decision_loss, replay_loss = gradients.of_step(step)
        if not masters.step(recipe.rate(step), recipe.max_gradient_norm):
            raise TrainingError(f"the gradients of step {step} are not finite")
        progress.curve.append([step, round(decision_loss, 4), round(replay_loss, 4)])
        progress.step, progress.seconds = step + 1, time.perf_counter() - began
        if report is not None:
            report(step, decision_loss, replay_loss)
        if progress.step % _STEPS_PER_CHECKPOINT == 0 or progress.step == last:
            save(out, model, masters, recipe, progress)
    return export(out / CHECKPOINT, out)


class Gradients:
    """Draws the data of each step and computes the gradients of the model's adapter on it."""

    def __init__(self, model: Any, tokenizer: Any, recipe: TrainingRecipe) -> None:
        self._model, self._tokenizer, self._recipe = model, tokenizer, recipe
        self._learned_texts = [tokenizer.encode(text, add_special_tokens=False) for text in documents("replay")]
        self._drawn_to_base = documents("replay", 200, packages=True)

    def of_step(self, step: int) -> tuple[float, float]:
        """Add a step's gradients. Returns its decision loss and its loss on plain text, in nats per token."""
        rng = random.Random(f"{self._recipe.seed}/{step}")
        decision_loss = self._decisions(rng, step)
        return decision_loss, self._plain_text(rng, step)

    def _decisions(self, rng: random.Random, step: int) -> float:
        stage, count = self._recipe.stage(step), self._recipe.conversations_per_step
        drawn = [encode(conversation(rng, stage=stage), self._tokenizer) for _ in range(count)]
        learned = sum(sum(example.learned) for example in drawn)
        total = 0.0
        for batch in passes(drawn, self._recipe.tokens_per_pass):
            loss = summed_loss(self._model, batch) / learned
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _plain_text(self, rng: random.Random, step: int) -> float:
        """Add the gradients on plain text: of its loss, or in the last stages of the divergence from the base."""
        recipe = self._recipe
        weight = recipe.divergence_weight(step)
        if weight is None:
            text = _window(rng, self._learned_texts, recipe.replay_tokens)
            loss, weight = summed_loss(self._model, [text]) / len(text.ids), recipe.replay_weight
        else:
            shuffled = "\n\n".join(rng.sample(self._drawn_to_base, k=8))
            ids = self._tokenizer.encode(shuffled, add_special_tokens=False)[: recipe.settle_replay_tokens]
            loss = distance_from_base(self._model, ids)
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


def _window(rng: random.Random, texts: Sequence[list[int]], tokens: int) -> TrainingExample:
    """Draw a run of tokens from one of the texts. All of them are learned."""
    ids = rng.choice(texts)
    start = rng.randint(0, max(0, len(ids) - tokens))
    cut = ids[start : start + tokens]
    return TrainingExample(cut, [True] * len(cut))
