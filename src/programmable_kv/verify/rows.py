"""Proves on a loaded model that rows in the middle of a context can be recomputed exactly, or says why they cannot.

Rows that are recomputed in the middle of an exact cache must not change. The check fails if, for example, a model
builds its mask from indices by itself, or if its attention window differs from the configured one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.verify.failures import is_out_of_memory, may_pass

Fill = Callable[[tuple[int, ...], tuple[int, ...]], KVBuffer]
"""(token ids, positions) -> a buffer in which they were prefilled alone."""

Recompute = Callable[[KVBuffer, tuple[int, ...], tuple[int, ...]], torch.Tensor]
"""(buffer, token ids, slots): computes the tokens in these slots -> the last one's logits, [1, vocabulary]."""

_ROWS_CHUNK = 40
_FEWEST = 8
"""Fewest positions of the check: with fewer, the five rows that it recomputes would not be distinct."""
_WIDEST_WINDOW = 512
"""In tokens: the check's context exceeds attention windows up to this size; that takes a forward of as many tokens."""


@dataclass(frozen=True, slots=True)
class RowsProof:
    """Whether rows in the middle of a context can be recomputed exactly, and if not, why."""

    exact: bool
    worst: float
    """the largest ratio of an error to its tolerance"""
    reason: str = ""
    settled: bool = True
    """False if the check failed for a reason that may be temporary, so that it has no verdict"""


def prove_rows(
    layout: KVLayout,
    windows: tuple[int, ...],
    prefill: Fill,
    recompute: Recompute,
    vocabulary: int,
    dtype: torch.dtype,
) -> RowsProof:
    """Recompute scattered rows of an exact cache and compare. `windows` are the window sizes in the configuration.

    Rows computed in another batch differ by rounding: each of L layers adds one rounding error of the dtype, relative
    to a key's norm, and independent errors add up to the square root of L. The margin is 32.

    Raises:
        torch.OutOfMemoryError, MemoryError: there was not enough memory for the check.
    """
    length = max([_ROWS_CHUNK, *(window + 16 for window in windows if window <= _WIDEST_WINDOW)])
    bounds = [bound for bound in (layout.position_limit, *(rule.within for rule in layout.frequency_rules)) if bound]
    length = min([length, *bounds])
    if length < _FEWEST:
        return RowsProof(False, float("inf"), f"{length} positions are too few for the check")
    ids = tuple((5 + 29 * i) % vocabulary for i in range(length))
    slots = (1, length // 4, length // 2, length // 2 + 1, length - 1)
    doing = "the check could not be run"
    try:
        buffer = prefill(ids[:-1], tuple(range(length - 1)))
        expected = recompute(buffer, ids[-1:], slots[-1:])
        before = [(buffer.keys(i).clone(), buffer.values(i).clone()) for i in range(len(buffer))]
        doing = "its attention does not accept a custom mask"
        logits = recompute(buffer, tuple(ids[slot] for slot in slots), slots)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        return RowsProof(False, float("inf"), f"{doing} ({first})", settled=not may_pass(error))
    allowed = min(0.5, 32 * len(layout.layers) ** 0.5 * torch.finfo(dtype).eps)
    worst, where = 0.0, ""
    # The output of the last layer's attention is not cached, so it is compared through the logits.
    compared = [("logits after", len(before), logits, expected)]
    for index, (keys, values) in enumerate(before):
        compared += [("keys of", index, buffer.keys(index), keys), ("values of", index, buffer.values(index), values)]
    for name, index, ours, theirs in compared:
        found, right = ours.cpu().double(), theirs.cpu().double()
        off = float((found - right).norm(dim=-1).amax() / right.norm(dim=-1).amax().clamp_min(1e-30))
        if not off / allowed <= worst:
            worst = off / allowed
            where = (
                f"the {name} layer {index} differ by {off:.2e} of their norm after rows are recomputed in place "
                f"(tolerance {allowed:.2e})"
            )
    return RowsProof(worst <= 1.0, worst, "" if worst <= 1.0 else where)
