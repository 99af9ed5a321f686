"""The progress of a run: saved to a folder, and resumed from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from programmable_kv.errors import TrainingError
from training.design.recipe import DesignRecipe
from training.masters import Masters

CHECKPOINT = "checkpoint.pt"


@dataclass(slots=True)
class Progress:
    """The state of a run, apart from its weights and optimizer, that is needed to continue it."""

    step: int = 0
    """steps done"""
    seconds: float = 0.0
    """seconds of training"""
    skipped: int = 0
    """number of steps skipped because their gradients were not finite"""
    curve: list[Any] = field(default_factory=list)
    """[step, seconds, divergence, loss by family] for each reported step"""
    before: dict[str, Any] = field(default_factory=dict)
    """held-out scores of the initial adapter"""
    averaged: int = 0
    """number of steps whose weights are in the mean"""
    mean: list[torch.Tensor] = field(default_factory=list)

    def average(self, tensors: list[torch.nn.Parameter]) -> None:
        """Include the current weights in the mean."""
        if not self.averaged:
            self.mean = [tensor.detach().clone() for tensor in tensors]
        self.averaged += 1
        for mean, tensor in zip(self.mean, tensors, strict=True):
            mean.lerp_(tensor.detach(), 1 / self.averaged)


def save(out: Path, masters: Masters, recipe: DesignRecipe, progress: Progress) -> None:
    """Write the checkpoint atomically."""
    state = {
        "masters": [tensor.data for tensor in masters.tensors],
        "optimizer": masters.optimizer.state_dict(),
        "recipe": _plain(recipe),
        # `asdict` would copy the tensors
        "progress": {name: getattr(progress, name) for name in progress.__dataclass_fields__},
    }
    partial = (out / CHECKPOINT).with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(out / CHECKPOINT)


def resume(out: Path, masters: Masters, recipe: DesignRecipe, device: torch.device) -> Progress:
    """Load the folder's checkpoint into the masters and the model's weights. Without a checkpoint, start from step 0.

    Raises:
        TrainingError: the checkpoint has another recipe.
    """
    if not (out / CHECKPOINT).exists():
        return Progress()
    state = torch.load(out / CHECKPOINT, weights_only=True, map_location=device)
    if state["recipe"] != _plain(recipe):
        raise TrainingError(
            f"{out / CHECKPOINT} was written by another recipe. Choose another folder, delete it, or repeat the "
            "original options."
        )
    masters.load(state["masters"], state["optimizer"])
    return Progress(**state["progress"])


def _plain(recipe: DesignRecipe) -> dict[str, Any]:
    return {**asdict(recipe), "mixture": [list(pair) for pair in recipe.mixture]}
