"""The losses of a training step, and the batches on which they are computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from training.conversation import TrainingExample


def passes(drawn: list[TrainingExample], tokens: int) -> list[list[TrainingExample]]:
    """Batch examples of similar lengths. Each batch has at most `tokens` padded tokens, or only one example."""
    batches: list[list[TrainingExample]] = []
    for example in sorted(drawn, key=lambda example: len(example.ids)):
        if batches and _width([*batches[-1], example]) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def _width(examples: list[TrainingExample]) -> int:
    """Return the padded length. With few distinct widths, the CPU's matrix kernels are prepared once and reused."""
    return math.ceil(max(len(example.ids) for example in examples) / 64) * 64


def summed_loss(model: Any, batch: list[TrainingExample]) -> torch.Tensor:
    """Return the cross entropy summed over the learned tokens. The vocabulary projection runs only on their rows.

    Padding is on the right, where real tokens cannot attend to it in a causal model, so no mask is needed.
    """
    width = _width(batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        learned[row, : len(example.ids)] = torch.tensor(example.learned)
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state
    rows = learned[:, 1:]
    logits = causal_lm.lm_head(hidden[:, :-1][rows]).float()
    return nn.functional.cross_entropy(logits, ids[:, 1:][rows], reduction="sum")


def distance_from_base(model: Any, text: list[int]) -> torch.Tensor:
    """Return KL(base || adapted) of the next-token distributions, as the mean over a text's tokens."""
    ids = torch.tensor([text])
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    adapted = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return nn.functional.kl_div(adapted, base, log_target=True, reduction="batchmean")
