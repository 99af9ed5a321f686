"""Pads sequences into batches, moves them to the model's device, and computes the losses on them.

Little is moved: integer columns and each sequence's table of parts. The masks are made on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.design.masks import visible
from training.design.parts import NEVER, TokenSequence

_WIDTH = 64
"""padded lengths are multiples of this, so that there are few distinct ones, and because attention kernels want it"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences, as numpy arrays, so that a worker can send them through a pipe."""

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    part: NDArray[np.int32]
    dead: NDArray[np.int32]
    learned: NDArray[np.bool_]
    reads: NDArray[np.bool_]
    families: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Number of padded tokens."""
        return int(self.ids.size)


def batches(drawn: Sequence[TokenSequence], tokens: int) -> list[Batch]:
    """Batch sequences of similar lengths. Each batch has at most `tokens` padded tokens, or only one sequence.

    Of all ways to split the sequences, sorted by length, this is the cheapest. The price counts padded tokens and
    batches.
    """
    ordered = sorted(drawn, key=len, reverse=True)
    price_of_batch = tokens / 8  # about the cost of the launches of one more pass
    best: list[tuple[float, int]] = [(0.0, 0)]
    """for the first n sequences, at index n: their price, and the index at which the last batch begins"""
    for stop in range(1, len(ordered) + 1):
        choices = []
        for start in range(stop):
            padded = _padded(len(ordered[start])) * (stop - start)
            if padded <= tokens or start == stop - 1:
                choices.append((best[start][0] + price_of_batch + padded, start))
        best.append(min(choices))
    found, stop = [], len(ordered)
    while stop:
        start = best[stop][1]
        found.append(_padded_together(ordered[start:stop]))
        stop = start
    return found


def _padded(length: int) -> int:
    return math.ceil(length / _WIDTH) * _WIDTH


def _padded_together(group: Sequence[TokenSequence]) -> Batch:
    shape = len(group), _padded(max(map(len, group)))
    parts = max(len(sequence.reads) for sequence in group) + 1
    batch = Batch(
        np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, parts - 1, np.int32),
        np.full(shape, NEVER, np.int32), np.zeros(shape, bool), np.zeros((len(group), parts, parts), bool),
        tuple(sequence.family for sequence in group),
    )  # fmt: skip
    for row, sequence in enumerate(group):
        n, p = len(sequence), len(sequence.reads)
        batch.ids[row, :n], batch.positions[row, :n] = sequence.ids, sequence.positions
        batch.part[row, :n], batch.dead[row, :n] = sequence.part, sequence.dead
        batch.learned[row, :n], batch.reads[row, :p, :p] = sequence.learned, sequence.reads
    return batch


@dataclass(frozen=True, slots=True)
class Predicted:
    """A model's predictions for the n learned tokens of a batch."""

    loss: torch.Tensor
    """[n], cross entropy in nats"""
    right: torch.Tensor
    """[n], whether the token is the most likely one"""
    row: torch.Tensor
    """[n], the token's sequence"""


def moved(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on the device, without waiting for the device."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """Return the last layer's hidden states [B, T, hidden], under the batch's masks."""
    causal_lm = _causal_lm(model)
    device = next(causal_lm.parameters()).device
    ids, positions, part, dead = (
        moved(column, device).long() for column in (batch.ids, batch.positions, batch.part, batch.dead)
    )
    mask = visible(part, positions, dead, moved(batch.reads, device))
    states: torch.Tensor = causal_lm.model(
        input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return states


def predicted(model: Any, batch: Batch) -> Predicted:
    """Predict a batch's learned tokens. The vocabulary projection runs only on the rows before them."""
    states = hidden_states(model, batch)
    rows, before = (moved(index, states.device) for index in np.nonzero(batch.learned[:, 1:]))
    targets = moved(batch.ids[:, 1:][batch.learned[:, 1:]], states.device).long()
    logits = _causal_lm(model).lm_head(states[rows, before]).float()
    loss = nn.functional.cross_entropy(logits, targets, reduction="none")
    return Predicted(loss, logits.argmax(-1) == targets, rows)


def divergence(model: Any, windows: NDArray[np.int32]) -> torch.Tensor:
    """Return KL(base || adapted) of the next-token distributions on plain text [W, T], as the mean per token."""
    causal_lm = _causal_lm(model)
    ids = moved(windows, next(causal_lm.parameters()).device).long()
    with torch.no_grad(), model.disable_adapter():
        base = causal_lm(input_ids=ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
    adapted = causal_lm(input_ids=ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
    return nn.functional.kl_div(adapted, base, log_target=True, reduction="batchmean")


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
