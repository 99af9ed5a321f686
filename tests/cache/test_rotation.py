"""Rotation by an offset: R(p + d) = R(d) R(p) for every pairing, width and dtype, and checks that errors would show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.cache.rotation import Pairing, Rotary, rotate


def rotary(width: int, pairing: Pairing, start: int = 0, theta: float = 1e4) -> Rotary:
    return Rotary(tuple(theta ** (-2 * i / width) for i in range(width // 2)), start, pairing)


def by_definition(key: torch.Tensor, position: int, rule: Rotary) -> torch.Tensor:
    """Turn each channel pair of one key [D] by position times frequency, one 2 x 2 matrix at a time."""
    turned = key.clone()
    for i, frequency in enumerate(rule.frequencies):
        if rule.pairing is Pairing.HALF_SPLIT:
            a, b = rule.start + i, rule.start + i + rule.width // 2
        else:
            a, b = rule.start + 2 * i, rule.start + 2 * i + 1
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        matrix = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
        turned[[a, b]] = matrix @ key[[a, b]]
    return turned


@pytest.mark.parametrize("pairing", list(Pairing))
@pytest.mark.parametrize(("width", "start"), [(16, 0), (8, 0), (8, 4)])
def test_equals_the_definition(pairing: Pairing, width: int, start: int) -> None:
    rule = rotary(width, pairing, start)
    keys = torch.randn(3, 16, dtype=torch.float64)
    offsets = torch.tensor([5, -3, 1000])
    moved = rotate(keys, offsets, rule)
    for key, offset, result in zip(keys, offsets.tolist(), moved, strict=True):
        torch.testing.assert_close(result, by_definition(key, offset, rule), rtol=0, atol=1e-12)


@given(st.integers(-4096, 4096), st.integers(-4096, 4096), st.sampled_from(list(Pairing)))
@settings(max_examples=60, deadline=None)
def test_rotations_compose_and_invert(first: int, second: int, pairing: Pairing) -> None:
    rule = rotary(8, pairing)
    keys = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def by(tensor: torch.Tensor, offset: int) -> torch.Tensor:
        return rotate(tensor, torch.full((4,), offset), rule)

    torch.testing.assert_close(by(by(keys, first), second), by(keys, first + second), rtol=0, atol=1e-11)
    torch.testing.assert_close(by(by(keys, first), -first), keys, rtol=0, atol=1e-11)


def test_channels_outside_the_window_are_copied() -> None:
    keys = torch.randn(2, 16)
    moved = rotate(keys, torch.tensor([7, 7]), rotary(8, Pairing.HALF_SPLIT, start=4))
    assert torch.equal(moved[:, :4], keys[:, :4])
    assert torch.equal(moved[:, 12:], keys[:, 12:])
    assert not torch.equal(moved[:, 4:12], keys[:, 4:12])


@pytest.mark.parametrize("wrong", ["by one", "pairing", "theta"])
def test_a_wrong_rotation_shows(wrong: str) -> None:
    rule = rotary(16, Pairing.HALF_SPLIT)
    keys = torch.randn(4, 16, dtype=torch.float64)
    right = rotate(keys, torch.full((4,), 20), rule)
    other = {
        "by one": lambda: rotate(keys, torch.full((4,), 21), rule),
        "pairing": lambda: rotate(keys, torch.full((4,), 20), rule.paired(Pairing.INTERLEAVED)),
        "theta": lambda: rotate(keys, torch.full((4,), 20), rotary(16, Pairing.HALF_SPLIT, theta=2e4)),
    }[wrong]()
    assert float((right - other).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_once(dtype: torch.dtype) -> None:
    keys = torch.randn(4, 16).to(dtype)
    rule = rotary(16, Pairing.HALF_SPLIT)
    exact = rotate(keys.double(), torch.full((4,), 777), rule)
    moved = rotate(keys, torch.full((4,), 777), rule)
    assert moved.dtype is dtype
    # The bound allows one rounding to dtype, after float32 arithmetic on values of about the key's norm.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 8 * 2.0**-24 * keys.double().norm(dim=-1, keepdim=True)
    assert bool(((moved.double() - exact).abs() <= bound).all())
