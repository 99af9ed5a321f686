"""What a score is compared with: as many positions, heads or directions, drawn at random.

Positions are drawn from the same stratum of the context as those they stand for, because the last tokens of a prompt carry more
than the first ones, whatever they say.
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
    """As many eligible slots as were chosen, none of them chosen, as many from each stratum (tenth) of the eligible ones.

    Raises:
        InvalidArgumentError: a chosen slot is not eligible, or a stratum has too few others.
    """
    ordered = sorted(set(eligible))
    taken = set(chosen)
    if not taken <= set(ordered) or len(taken) != len(chosen):
        raise InvalidArgumentError(f"chosen slots must be eligible, each once; got {sorted(chosen)[:8]}...")
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
    """As many (layer, head) as were chosen, in the same layers, none of them chosen.

    Raises:
        InvalidArgumentError: a layer has too few other heads.
    """
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in chosen}):
        wanted = {head for each, head in chosen if each == layer}
        others = sorted(set(range(heads)) - wanted)
        if len(others) < len(wanted):
            raise InvalidArgumentError(
                f"{len(wanted)} of {heads} heads of layer {layer} are chosen: too few others to draw"
            )
        drawn += [(layer, head) for head in sorted(rng.sample(others, len(wanted)))]
    return tuple(drawn)


def random_basis(basis: torch.Tensor, seed: int, *, covariance: torch.Tensor | None = None) -> torch.Tensor:
    """A random subspace [d, k] of as many dimensions as a basis, with orthonormal columns (on the CPU, seeded).

    With a `covariance` [d, d] of the activations, directions are drawn as likely as activations vary along them: a direction in
    which nothing ever varies is a null too easily beaten.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    if covariance is not None:
        values, vectors = torch.linalg.eigh(covariance.to("cpu", torch.float64))
        drawn = vectors @ (values.clamp_min(0).sqrt()[:, None] * (vectors.T @ drawn))
    columns: torch.Tensor = torch.linalg.qr(drawn).Q
    return columns.to(basis)
