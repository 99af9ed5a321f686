"""Distributed alignment search: finds the subspace along which other activations change a decision as predicted.

Source: Geiger et al., Finding Alignments Between Interpretable Causal Variables (arXiv 2303.02536), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.changes import interchanged
from programmable_kv.lab.tools.sites import Site, changed

Loss = Callable[[torch.Tensor], torch.Tensor]
"""logits of the last row [vocabulary] -> their distance from what the hypothesis predicts"""


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One interchange: rows appended to a context, other activations for some of them, and the loss of the outcome."""

    buffer: KVBuffer
    rows: Rows
    values: torch.Tensor
    """[n, d] activations of the site in the other context"""
    loss: Loss
    slots: tuple[int, ...] | None = None
    """slots of the n rows that are changed; None: the last row"""

    @property
    def where(self) -> tuple[int, ...]:
        return self.rows.slots[-1:] if self.slots is None else self.slots


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """A learned subspace."""

    basis: torch.Tensor
    """[d, k], orthonormal columns"""
    losses: tuple[float, ...]
    """mean loss at each step"""


def align(
    engine: Engine,
    site: Site,
    exchanges: Sequence[Exchange],
    dimensions: int,
    *,
    steps: int = 100,
    rate: float = 0.05,
    seed: int = 0,
    start: torch.Tensor | None = None,
    batch: int | None = None,
) -> Alignment:
    """Learn a subspace by gradient descent over orthonormal bases (Adam on a QR parametrisation, seeded).

    Fit on some domains, score with `expected_loss` on others, and compare with random subspaces (`nulls.random_basis`).
    Buffers and model are unchanged.

    Args:
        start: [d, k], the initial basis; random when None.
        batch: how many exchanges are drawn at random for each step; all when None.

    Raises:
        InvalidArgumentError: there are no exchanges, `dimensions` is not in [1, d], or `start` has another shape.
    """
    if not exchanges or not 0 < dimensions <= exchanges[0].values.shape[-1]:
        raise InvalidArgumentError(f"cannot fit {dimensions} dimensions to {len(exchanges)} exchanges")
    first = exchanges[0].values
    if start is not None and start.shape != (first.shape[-1], dimensions):
        raise InvalidArgumentError(
            f"a basis of shape {list(start.shape)} cannot start a fit of {dimensions} dimensions"
        )
    generator = torch.Generator().manual_seed(seed)
    compute = torch.promote_types(first.dtype, torch.float32)
    if start is None:
        start = torch.randn(first.shape[-1], dimensions, generator=generator, dtype=torch.float64)
    free = torch.nn.Parameter(torch.linalg.qr(start).Q.to(first.device, compute))
    optimiser = torch.optim.Adam([free], lr=rate)
    losses = []
    for _ in range(steps):
        total = 0.0
        gradient = torch.zeros_like(free)
        drawn = torch.randperm(len(exchanges), generator=generator)[: batch or len(exchanges)].tolist()
        for each in (exchanges[index] for index in sorted(drawn)):
            basis = torch.linalg.qr(free).Q
            with changed(engine, each.buffer, site, interchanged(each.values, basis), each.where):
                with engine.graph(each.buffer, each.rows) as graph:
                    loss = each.loss(graph.logits[-1])
                    # Only the basis gets a gradient, not the model's parameters.
                    gradient += torch.autograd.grad(loss, free)[0] / len(drawn)
                total += float(loss.detach()) / len(drawn)
        free.grad = gradient
        optimiser.step()
        losses.append(total)
    with torch.no_grad():
        return Alignment(torch.linalg.qr(free).Q.detach(), tuple(losses))


def expected_loss(engine: Engine, site: Site, exchanges: Sequence[Exchange], basis: torch.Tensor) -> float:
    """Return the mean loss of exchanges along a given subspace. Buffers and model are unchanged."""
    total = 0.0
    for each in exchanges:
        with changed(engine, each.buffer, site, interchanged(each.values, basis), each.where):
            total += float(each.loss(engine.compute(each.buffer, each.rows)[-1])) / len(exchanges)
    return total
