"""Random baselines for a score: the same number of positions, heads or directions, drawn at random.

Positions are drawn from the same strata of the context as the chosen ones, because the last tokens of a prompt carry
more than the first ones, whatever they say.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from programmable_kv.errors import InvalidArgumentError

STRATA = 10


def random_slots(
    chosen: Sequence[int], eligible: Sequence[int], rng: random.Random, *, strata: int = STRATA
) -> tuple[int, ...]:
    """Draw as many eligible slots as were chosen, but none of the chosen ones; as many from each stratum (tenth).

    Raises:
        InvalidArgumentError: a chosen slot is not eligible or repeated, or a stratum has too few other slots.
    """
    ordered = sorted(set(eligible))
    taken = set(chosen)
    if not taken <= set(ordered) or len(taken) != len(chosen):
        raise InvalidArgumentError(f"chosen slots must be eligible and distinct; got {sorted(chosen)[:8]}...")
    drawn: list[int] = []
    for part in _strata(ordered, strata):
        wanted = [slot for slot in part if slot in taken]
        others = [slot for slot in part if slot not in taken]
        if len(others) < len(wanted):
            raise InvalidArgumentError(
                f"{len(wanted)} of the {len(part)} slots in [{part[0]}, {part[-1]}] are chosen: no {len(wanted)} others to draw"
            )
        drawn += rng.sample(others, len(wanted))
    return tuple(sorted(drawn))


def _strata(ordered: Sequence[int], strata: int) -> Iterator[Sequence[int]]:
    count = min(strata, len(ordered))
    for index in range(count):
        yield ordered[len(ordered) * index // count : len(ordered) * (index + 1) // count]


def random_heads(chosen: Sequence[tuple[int, int]], heads: int, rng: random.Random) -> tuple[tuple[int, int], ...]:
    """Draw as many (layer, head) as were chosen, in the same layers, but none of the chosen ones.

    Raises:
        InvalidArgumentError: a layer has too few other heads.
    """
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in chosen}):
        wanted = {head for each, head in chosen if each == layer}
        others = sorted(set(range(heads)) - wanted)
        if len(others) < len(wanted):
            raise InvalidArgumentError(
                f"{len(wanted)} of {heads} heads of layer {layer} are chosen, so too few others are left to draw from"
            )
        drawn += [(layer, head) for head in sorted(rng.sample(others, len(wanted)))]
    return tuple(drawn)


def random_basis(basis: torch.Tensor, seed: int, *, covariance: torch.Tensor | None = None) -> torch.Tensor:
    """Draw a random subspace [d, k] with the dimensions of `basis` and orthonormal columns (on the CPU, seeded).

    With a `covariance` [d, d] of the activations, directions along which activations vary more are more likely. A
    direction along which nothing varies is a null that is too easy to beat.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    if covariance is not None:
        values, vectors = torch.linalg.eigh(covariance.to("cpu", torch.float64))
        drawn = vectors @ (values.clamp_min(0).sqrt()[:, None] * (vectors.T @ drawn))
    columns: torch.Tensor = torch.linalg.qr(drawn).Q
    return columns.to(basis)
