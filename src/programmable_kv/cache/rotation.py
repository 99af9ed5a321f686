"""RoPE as one rotation by an offset.

A rotary key at position p is k_p = s R(p) k, with R(p) turning each channel pair i by the angle p f_i. Rotations
compose, R(p + d) = R(d) R(p), so moving a cached key by d positions is one rotation by d f_i. The factor s that
YaRN-style models multiply into cos and sin is already in the key and must not be applied again.
Source: Su et al., RoFormer, section 3.2 (arXiv 2104.09864).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch


class Pairing(StrEnum):
    """Which two channels turn together: i with i + R/2, or 2i with 2i + 1 (R rotary channels)."""

    HALF_SPLIT = "half-split"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, slots=True)
class Rotary:
    """How one layer's keys rotate: which channels, paired how, at which frequencies (radians a position)."""

    frequencies: tuple[float, ...]
    start: int = 0
    pairing: Pairing = Pairing.HALF_SPLIT
    axes: tuple[int, ...] = ()
    """with positions of several axes (M-RoPE: time, height, width), the axis that turns each frequency"""

    @classmethod
    def from_table(cls, table: torch.Tensor) -> Rotary:
        """From a model's own frequency buffer [R / 2]. The values are the buffer's, widened to float64."""
        return cls(tuple(table.detach().to("cpu", torch.float64).tolist()))

    @property
    def width(self) -> int:
        """R, the number of rotary channels."""
        return 2 * len(self.frequencies)

    def paired(self, pairing: Pairing) -> Rotary:
        return replace(self, pairing=pairing)

    def angles(self, offsets: torch.Tensor) -> torch.Tensor:
        """Radians in float64, [T, R / 2], for offsets [T] (the same on every axis) or [A, T] (one row an axis)."""
        # MPS has no float64: angles are made on the CPU, where they are T x R/2 numbers.
        moved = offsets.to("cpu", torch.float64)
        if moved.ndim == 1:
            moved = moved[:, None]
        elif self.axes:
            moved = moved[list(self.axes)].T
        else:
            raise ValueError("this rotation has no axes of its own: give one offset for each token, [T]")
        return moved * torch.tensor(self.frequencies, dtype=torch.float64)


def rotate(
    keys: torch.Tensor, offsets: torch.Tensor, rotary: Rotary, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys moved by `offsets` positions, in a new tensor or in `out`.

    Args:
        keys: [..., T, D], any floating dtype. Channels outside the rotary window are copied.
        offsets: [T] integer positions to move each token by (may be negative); [A, T] if axes move by their own.
        rotary: the layer's rotation.
        out: like `keys`, and no part of them; a view of a buffer spares a copy.

    The angles are computed in float64 and reduced there, so large offsets lose nothing; the rotation itself runs
    in float32 or the keys' dtype, whichever is wider, with one rounding at the end.
    """
    result = torch.empty_like(keys) if out is None else out
    compute = torch.promote_types(keys.dtype, torch.float32)
    if offsets.ndim == 1 and offsets.numel() and bool((offsets == offsets[0]).all()):
        offsets = offsets[:1]  # a run that moves as one: one angle a channel pair, not one a token
    angles = rotary.angles(offsets)
    cos, sin = angles.cos().to(keys.device, compute), angles.sin().to(keys.device, compute)
    stop = rotary.start + rotary.width
    for outside in (slice(0, rotary.start), slice(stop, keys.shape[-1])):
        result[..., outside] = keys[..., outside]
    first, second = (half.to(compute) for half in _halves(keys[..., rotary.start : stop], rotary.pairing))
    to_first, to_second = _halves(result[..., rotary.start : stop], rotary.pairing)
    if result.dtype == compute:
        torch.mul(first, cos, out=to_first).sub_(second * sin)
        torch.mul(second, cos, out=to_second).add_(first * sin)
    else:
        to_first.copy_((first * cos).sub_(second * sin))
        to_second.copy_((second * cos).add_(first * sin))
    return result


def put(keys: torch.Tensor, offsets: torch.Tensor, rotary: Rotary | None, out: torch.Tensor) -> None:
    """Write keys [..., T, D] into `out`, moved by `offsets` [T] positions; as they are where the layer does not rotate."""
    if rotary is None:
        out.copy_(keys)
    else:
        rotate(keys, offsets, rotary, out=out)


def _halves(window: torch.Tensor, pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channel of every pair; views."""
    if pairing is Pairing.INTERLEAVED:
        return window[..., 0::2], window[..., 1::2]
    half = window.shape[-1] // 2
    return window[..., :half], window[..., half:]
