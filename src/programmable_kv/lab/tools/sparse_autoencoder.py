"""A sparse autoencoder: it approximates activations by a sum of few directions out of many learned ones.

Only the `active` largest features of an activation are kept. Compare a trained autoencoder with a frozen one, whose
decoder stays random and of which only the encoder is trained. A result that the frozen one also gives is no evidence
for the learned directions.
Sources: Gao et al., Scaling and Evaluating Sparse Autoencoders (arXiv 2406.04093), section 2.3; Korznikov et al.,
Sanity Checks for Sparse Autoencoders (arXiv 2602.14111), the frozen decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from programmable_kv.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class SparseAutoencoder:
    """Features of activations. All its tensors, and all that its methods return, are float32 on the CPU."""

    encoder: torch.Tensor
    """[m, d]"""
    bias: torch.Tensor
    """[m]"""
    decoder: torch.Tensor
    """[m, d], each feature's direction, of unit length"""
    centre: torch.Tensor
    """[d], the mean of the activations"""
    scale: float
    """root mean square of the centred activations' entries; activations are divided by it before they are encoded"""
    active: int
    """how many features are kept for an activation"""

    @property
    def directions(self) -> torch.Tensor:
        return self.decoder

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode activations [n, d]: the amount of each feature, [n, m], in the unit of the activations.

        No amount is negative, and at most `active` in a row are not zero.
        """
        centred = (rows.to(self.centre) - self.centre) / self.scale
        kept, which = _largest(centred, self.encoder, self.bias, self.active)
        return torch.zeros(len(rows), len(self.bias)).scatter(1, which, kept) * self.scale

    def decoded(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes [n, m] to activations [n, d]."""
        return self.centre + codes @ self.decoder

    def unexplained(self, rows: torch.Tensor) -> float:
        """Return the share of the variance of activations [n, d] that is lost when they are encoded and decoded.

        Raises:
            InvalidArgumentError: the rows do not vary.
        """
        own = rows.to(self.centre)
        spread = float(((own - own.mean(dim=0)) ** 2).sum())
        if not spread > 0:
            raise InvalidArgumentError("the activations are all equal, so there is no variance to explain")
        return float(((own - self.decoded(self.codes(own))) ** 2).sum()) / spread


def train(
    rows: torch.Tensor,
    features: int,
    active: int,
    *,
    steps: int,
    batch: int = 1024,
    rate: float = 1e-3,
    seed: int = 0,
    frozen: bool = False,
) -> SparseAutoencoder:
    """Train an autoencoder on activations [n, d] (Adam, seeded; the rate falls to zero in the last fifth of the steps).

    Directions start as activations drawn at random. With `frozen`, they are random and not trained.

    Raises:
        InvalidArgumentError: there are fewer than two rows, the rows do not vary, or `active` is not in [1, features].
    """
    if not 0 < active <= features or len(rows) < 2:
        raise InvalidArgumentError(f"cannot keep {active} of {features} features with {len(rows)} activations")
    rows = rows.to("cpu", torch.float32)
    centre = rows.mean(dim=0)
    centred = rows - centre
    scale = float((centred**2).mean() ** 0.5)
    if not scale > 0:
        raise InvalidArgumentError("the activations are all equal, so there are no features to learn")
    centred = centred / scale
    generator = torch.Generator().manual_seed(seed)
    decoder = _directions(centred, features, generator, frozen=frozen)
    encoder, bias = decoder.clone(), torch.zeros(features)
    learned = [encoder, bias] if frozen else [encoder, bias, decoder]
    optimiser = torch.optim.Adam([each.requires_grad_() for each in learned], lr=rate)
    for step in range(steps):
        drawn = centred[torch.randint(len(centred), (min(batch, len(centred)),), generator=generator)]
        kept, which = _largest(drawn, encoder, bias, active)
        rebuilt = torch.nn.functional.embedding_bag(which, decoder, per_sample_weights=kept, mode="sum")
        loss = ((drawn - rebuilt) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, 5 * (steps - step) / steps)
        optimiser.step()
        with torch.no_grad():
            decoder.copy_(torch.nn.functional.normalize(decoder, dim=1))
    return SparseAutoencoder(encoder.detach(), bias.detach(), decoder.detach(), centre, scale, active)


def _largest(
    centred: torch.Tensor, encoder: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest features of each row and their indices, both [n, active]."""
    kept, which = torch.addmm(bias, centred, encoder.T).topk(active, dim=1, sorted=False)
    return kept.relu(), which


def _directions(centred: torch.Tensor, features: int, generator: torch.Generator, *, frozen: bool) -> torch.Tensor:
    """Draw unit directions [features, d]: activations, so that few features are never used; random ones if `frozen`."""
    if frozen:
        drawn = torch.randn(features, centred.shape[1], generator=generator)
    else:
        drawn = centred[torch.randint(len(centred), (features,), generator=generator)]
        # An activation that is drawn twice would give two features that stay identical.
        drawn = drawn + 0.1 * torch.randn(drawn.shape, generator=generator)
    return torch.nn.functional.normalize(drawn, dim=1)
