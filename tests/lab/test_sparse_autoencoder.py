"""A sparse autoencoder finds the directions that were used, and one that keeps all of them reconstructs its input."""

from __future__ import annotations

import pytest
import torch

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.sparse_autoencoder import SparseAutoencoder, train


def complete(width: int, *, mean: float = 0.0) -> SparseAutoencoder:
    """Both directions of every dimension, all of them kept: nothing is lost."""
    both = torch.cat((torch.eye(width), -torch.eye(width)))
    return SparseAutoencoder(both, torch.zeros(2 * width), both, torch.full((width,), mean), 2.0, 2 * width)


def test_one_that_keeps_everything_is_the_identity() -> None:
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    whole = complete(6, mean=1.0)
    codes = whole.codes(rows)
    assert bool((codes >= 0).all())
    torch.testing.assert_close(whole.decoded(codes), rows)
    assert whole.unexplained(rows) == pytest.approx(0, abs=1e-9)


def test_few_are_kept_and_they_are_the_largest() -> None:
    rows = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, -5.0]])
    kept = SparseAutoencoder(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), 1.0, 2)
    assert kept.codes(rows).tolist() == [[3, 0, 2], [0, 0, 0]]
    lost = (rows - kept.decoded(kept.codes(rows))) ** 2
    assert kept.unexplained(rows) == pytest.approx(float(lost.sum() / ((rows - rows.mean(dim=0)) ** 2).sum()))


def drawn(count: int, directions: torch.Tensor, seed: int) -> torch.Tensor:
    """Activations that are sums of two directions each, in positive amounts, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(count, len(directions), generator=generator).argsort(dim=1)[:, :2]
    amounts = torch.zeros(count, len(directions)).scatter(1, which, 1 + torch.rand(count, 2, generator=generator))
    return 5 + amounts @ directions


def test_training_finds_the_directions_and_a_frozen_one_does_not() -> None:
    """Twelve directions in eight dimensions, two in each activation, are found, and new activations reconstructed."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    learned, other = drawn(4000, directions, 2), drawn(500, directions, 3)
    found = train(learned, 16, 2, steps=1500, batch=256, rate=5e-3)
    frozen = train(learned, 16, 2, steps=1500, batch=256, rate=5e-3, frozen=True)
    assert found.unexplained(other) < 0.5 * frozen.unexplained(other)
    near = (directions @ found.decoder.T).max(dim=1).values
    near_frozen = (directions @ frozen.decoder.T).max(dim=1).values
    assert float(near.median()) > 0.95, near
    assert float(near_frozen.median()) < 0.95
    torch.testing.assert_close(found.decoder.norm(dim=1), torch.ones(16))


def test_a_frozen_ones_directions_stay_and_seeds_decide() -> None:
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(4))
    short, long = (train(rows, 8, 2, steps=steps, frozen=True, seed=5) for steps in (1, 30))
    torch.testing.assert_close(short.decoder, long.decoder)
    assert not torch.allclose(short.encoder, long.encoder)
    again, other = (train(rows, 8, 2, steps=30, seed=seed) for seed in (0, 1))
    assert torch.equal(train(rows, 8, 2, steps=30).decoder, again.decoder)
    assert not torch.equal(again.decoder, other.decoder)


def test_what_cannot_be_learnt_is_refused() -> None:
    rows = torch.randn(10, 4)
    for features, active in ((4, 5), (4, 0)):
        with pytest.raises(InvalidArgumentError, match="cannot keep"):
            train(rows, features, active, steps=1)
    with pytest.raises(InvalidArgumentError, match="are all equal"):
        train(torch.ones(10, 4), 4, 1, steps=1)
    with pytest.raises(InvalidArgumentError, match="are all equal"):
        complete(4).unexplained(torch.ones(3, 4))
