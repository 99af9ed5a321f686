"""A rotation is found anywhere in a head, in every pairing and direction, and only if it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from programmable_kv.cache.rotation import Pairing, Rotary, rotate
from programmable_kv.verify.candidates import PositionPair, axes_of, best_rule

TABLE = Rotary(tuple(1e4 ** (-2 * i / 16) for i in range(8)))
ALLOWED = 1e-12


def moves(truth: Rotary | None, width: int = 32) -> list[PositionPair]:
    made = []
    for step in (1, 64, 4096):
        before = torch.randn(1, 2, 1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        offsets = torch.tensor([step])
        made.append(PositionPair(offsets, before, before if truth is None else rotate(before, offsets, truth)))
    return made


@pytest.mark.parametrize(
    "truth",
    [
        None,
        TABLE,
        replace(TABLE, start=16),
        replace(TABLE, start=6, pairing=Pairing.INTERLEAVED),
        replace(TABLE, frequencies=tuple(-f for f in TABLE.frequencies)),
        replace(TABLE, frequencies=(*TABLE.frequencies[::2], *TABLE.frequencies[1::2])),
    ],
    ids=["a copy", "as expected", "last channels", "interleaved, in the middle", "backwards", "reordered"],
)
@pytest.mark.parametrize("expected", [TABLE, None], ids=["stated", "unstated"])
def test_what_moved_the_keys_is_found(truth: Rotary | None, expected: Rotary | None) -> None:
    found = best_rule(expected, (TABLE,), moves(truth), ALLOWED)
    assert found.rule == truth
    assert found.error <= ALLOWED


@pytest.mark.parametrize(
    "truth",
    [
        replace(TABLE, frequencies=tuple(f * 1.001 for f in TABLE.frequencies)),
        replace(TABLE, frequencies=(*TABLE.frequencies[:-1], TABLE.frequencies[-1] * 1.01)),
    ],
    ids=["all a little fast", "the slowest a little fast"],
)
def test_nothing_is_found_when_nothing_holds(truth: Rotary) -> None:
    assert best_rule(TABLE, (TABLE,), moves(truth), ALLOWED).error > 100 * ALLOWED


@pytest.mark.parametrize(
    "axes", [(0, 0, 0, 1, 1, 1, 2, 2), (0, 1, 2, 0, 1, 2, 0, 0)], ids=["sections", "interleaved sections"]
)
def test_the_axis_of_each_frequency_is_found(axes: tuple[int, ...]) -> None:
    truth = replace(TABLE, axes=axes)
    before = torch.randn(1, 2, 1, 32, dtype=torch.float64)
    alone = [torch.eye(3, dtype=torch.long)[axis][:, None] * 4096 for axis in range(3)]
    moved = [PositionPair(offsets, before, rotate(before, offsets, truth)) for offsets in alone]
    assert axes_of(TABLE, moved, ALLOWED) == truth
    assert axes_of(TABLE, [moved[0], moved[0], moved[2]], ALLOWED) is None, "two axes cannot turn the same channels"
