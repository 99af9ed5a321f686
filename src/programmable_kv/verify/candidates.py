"""Finds the rotation that turns the keys cached at one position into those cached at another.

A configuration does not say how channels are paired, where the rotary window lies in a head, or whether a layer rotates
at all. So candidates are tried on the model's own tensors, and the one that fits is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from programmable_kv.cache.rotation import Pairing, Rotary, rotate


@dataclass(frozen=True, slots=True)
class PositionPair:
    """A cached tensor of the same tokens at two positions, [B, H, T, D]; `offsets` [T] or [A, T] is the distance."""

    offsets: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    def error(self, rule: Rotary | None) -> torch.Tensor:
        """The absolute difference after rotating by the rule, relative to each token's norm, [B, H, T, D]."""
        turned = self.before if rule is None else rotate(self.before, self.offsets, rule)
        found, right = turned.cpu().double(), self.after.cpu().double()  # MPS has no float64
        scale = right.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        difference: torch.Tensor = (found - right).abs() / scale
        return difference


@dataclass(frozen=True, slots=True)
class RuleFit:
    """The best rule among the candidates (None: a copy), and its largest error relative to a token's norm."""

    rule: Rotary | None
    error: float


def best_rule(
    expected: Rotary | None, tables: Sequence[Rotary], pairs: Sequence[PositionPair], allowed: float
) -> RuleFit:
    """The first candidate whose error is allowed for every pair, or else the one with the smallest error."""
    width = pairs[0].before.shape[-1]
    found = []
    for rule in _candidates(expected, tables, width):
        found.append(RuleFit(rule, _worst(pairs, rule)))
        if found[-1].error <= allowed:
            return found[-1]
    for rule in _reordered(tables, width, pairs):
        found.append(RuleFit(rule, _worst(pairs, rule)))
        if found[-1].error <= allowed:
            break
    return min(found, key=lambda each: each.error)


def _worst(pairs: Sequence[PositionPair], rule: Rotary | None) -> float:
    """The largest error over all pairs; NaN if any error is NaN (so `<=` comparisons fail)."""
    return float(torch.stack([each.error(rule).max() for each in pairs]).max())


def _candidates(expected: Rotary | None, tables: Sequence[Rotary], width: int) -> Iterator[Rotary | None]:
    """The model's own rule, then a plain copy, then each of its tables in both directions, anywhere in the head."""
    own = [expected] if expected is not None else []
    likely = _placed(own, width, everywhere=False)
    yield from likely
    yield None
    seen = set(likely)
    known = [*own, *tables]
    backwards = [replace(table, frequencies=tuple(-f for f in table.frequencies)) for table in known]
    for everywhere in (False, True):
        for rule in _placed([*known, *backwards], width, everywhere=everywhere):
            if rule not in seen:
                seen.add(rule)
                yield rule


def _placed(tables: Iterable[Rotary], width: int, *, everywhere: bool) -> list[Rotary]:
    """Each table with both pairings, at the head's first or last channels, or with `everywhere` at every even one."""
    placed: list[Rotary] = []
    for table in tables:
        last = width - table.width
        if last < 0:
            continue
        starts = range(0, last + 1, 2) if everywhere else dict.fromkeys((0, last))
        for start in starts:
            placed.extend(replace(table, start=start, pairing=pairing) for pairing in Pairing)
    return placed


def _reordered(tables: Sequence[Rotary], width: int, pairs: Sequence[PositionPair]) -> Iterator[Rotary]:
    """Tables with frequencies in another order in the head: each channel pair gets the frequency that fits best."""
    for rule in _placed(tables, width, everywhere=False):
        each = [replace(rule, frequencies=(f,) * len(rule.frequencies)) for f in dict.fromkeys(rule.frequencies)]
        # [F, D]: the largest error of every channel if all pairs rotate with frequency f.
        worst = torch.stack(
            [torch.stack([m.error(one).amax(dim=(0, 1, 2)) for m in pairs]).amax(dim=0) for one in each]
        )
        channels = [_channels(rule, pair) for pair in range(len(rule.frequencies))]
        best = [int(worst[:, pair].amax(dim=1).argmin()) for pair in channels]
        yield replace(rule, frequencies=tuple(each[index].frequencies[0] for index in best))


def axes_of(rule: Rotary, pairs: Sequence[PositionPair], allowed: float) -> Rotary | None:
    """The rule with the axis of each frequency, or None if they cannot be found. `pairs` has one move along each axis.

    Each channel pair must rotate along exactly one axis and stay unchanged along the others.
    """
    axes: list[int] = []
    for pair in range(len(rule.frequencies)):
        turning = []
        for axis, each in enumerate(pairs):
            along = replace(rule, axes=tuple([axis] * len(rule.frequencies)))
            channels = _channels(rule, pair)
            turned = float(each.error(along)[..., channels].max()) <= allowed
            still = float(each.error(None)[..., channels].max()) <= allowed
            if turned and not still:
                turning.append(axis)
            elif not still:
                return None
        if len(turning) != 1:
            return None
        axes.append(turning[0])
    return replace(rule, axes=tuple(axes))


def _channels(rule: Rotary, pair: int) -> list[int]:
    if rule.pairing is Pairing.HALF_SPLIT:
        return [rule.start + pair, rule.start + pair + rule.width // 2]
    return [rule.start + 2 * pair, rule.start + 2 * pair + 1]
