"""Plain text: windows that draw the model to the base, and the perplexity of held-out text relative to the base."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from programmable_kv.scenarios.plain_text import documents
from training.design.parts import Encoding
from training.design.recipe import DesignRecipe

_FEWEST_CHARACTERS = 200
_HELD_OUT_SEED = 5


def windows(recipe: DesignRecipe, encoding: Encoding, step: int) -> NDArray[np.int32] | None:
    """Return the token ids [W, T] of a step's replayed text; None in a step without replay."""
    if step % recipe.replay_every or not recipe.replay_windows:
        return None
    rng = random.Random(f"{recipe.seed}/{step}/replay")
    texts = documents("replay", _FEWEST_CHARACTERS, packages=True)
    return _filled(rng, texts, encoding, recipe.replay_windows, recipe.replay_tokens)


def held_out_windows(encoding: Encoding, count: int, tokens: int) -> NDArray[np.int32]:
    """Return windows [count, tokens] of documents that training never replays."""
    return _filled(random.Random(_HELD_OUT_SEED), documents("held_out"), encoding, count, tokens)


def _filled(rng: random.Random, texts: Sequence[str], encoding: Encoding, count: int, tokens: int) -> NDArray[np.int32]:
    rows: list[list[int]] = []
    while len(rows) < count:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += encoding.ids(rng.choice(texts) + "\n\n")
        rows.append(ids[:tokens])
    return np.asarray(rows, dtype=np.int32)


@torch.no_grad()
def perplexity_ratio(model: Any, ids: NDArray[np.int32], at_once: int) -> float:
    """Return the adapted model's perplexity on a text divided by the base's. Below 1 is better than the base."""
    gap = 0.0
    for first in range(0, len(ids), at_once):
        rows = torch.from_numpy(ids[first : first + at_once]).to(next(model.parameters()).device).long()
        adapted = _loss(model, rows)
        with model.disable_adapter():
            gap += (adapted - _loss(model, rows)) * len(rows) / len(ids)
    return float(np.exp(gap))


def _loss(model: Any, rows: torch.Tensor) -> float:
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
