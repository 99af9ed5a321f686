"""Train a small decoder from scratch on toy policies, and show it at chosen steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from programmable_kv.lab.toy.policies import LENGTH, VOCABULARY, draw


@dataclass(frozen=True, slots=True)
class ToyRecipe:
    """What determines a toy model's weights, besides its seed."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    batch: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    plain_steps: int = 1200
    """Steps without updates of the field."""
    updated_steps: int = 800
    """Steps with updates in the given share of the policies."""
    updates: float = 0.5

    @property
    def steps(self) -> int:
        return self.plain_steps + self.updated_steps

    def shown(self) -> tuple[int, ...]:
        """The steps after which the model is shown: often where competence is found, then less often."""
        first = (*range(0, self.plain_steps, 40), *range(self.plain_steps, self.steps, 100))
        return (*first, self.steps)


def new_model(recipe: ToyRecipe, seed: int) -> Any:
    """A decoder with random weights (seeded), on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=recipe.width, intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=2 * LENGTH, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(recipe: ToyRecipe, seed: int, show: Callable[[int, Any], None]) -> None:
    """Train, and call `show(step, model)` after each of the recipe's shown steps. Only the answer carries loss."""
    model = new_model(recipe, seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    shown = set(recipe.shown())
    for step, (ids, answers) in enumerate(_batches(recipe, seed)):
        if step in shown:
            show(step, model.eval())
            model.train()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), answers)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
    show(recipe.steps, model.eval())


def _batches(recipe: ToyRecipe, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rng = random.Random(seed)
    for step in range(recipe.steps):
        drawn = [draw(rng, updates=recipe.updates if step >= recipe.plain_steps else 0.0) for _ in range(recipe.batch)]
        yield torch.tensor([each.ids() for each in drawn]), torch.tensor([each.right for each in drawn])
