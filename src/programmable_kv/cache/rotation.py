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

_TOKENS_AT_ONCE = 1024
"""few enough that what is read and written twice is still in the processor's cache the second time"""


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


def rotate(keys: torch.Tensor, offsets: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Keys [..., T, D] moved by `offsets` positions ([T], or [A, T] if axes move by their own), in a new tensor."""
    result = torch.empty_like(keys)
    Rotation(offsets).put(keys, rotary, result)
    return result


class Rotation:
    """Rotates tokens by `offsets` positions, in as many layers as are given to it.

    The angles are computed once for each rotation, in float64 and reduced there, so large offsets lose nothing. The rotation
    itself runs in float32 or the keys' dtype, whichever is wider, with one rounding at the end.
    """

    def __init__(self, offsets: torch.Tensor) -> None:
        """`offsets`: [T] integer positions to move each token by (may be negative); [A, T] if axes move by their own."""
        if offsets.ndim == 1 and offsets.numel() and bool((offsets == offsets[0]).all()):
            offsets = offsets[:1]  # a run that moves as one: one angle a channel pair, not one a token
        self._offsets = offsets
        self._tables: dict[tuple[Rotary, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def put(self, keys: torch.Tensor, rotary: Rotary | None, out: torch.Tensor) -> None:
        """Write a layer's keys [..., T, D] into `out`, rotated; unchanged if the layer does not rotate.

        `out` is like `keys`, and no part of them. Channels outside the rotary window are copied.
        """
        if rotary is None:
            out.copy_(keys)
            return
        compute = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = self._table(rotary, keys.device, compute)
        stop = rotary.start + rotary.width
        for outside in (slice(0, rotary.start), slice(stop, keys.shape[-1])):
            out[..., outside] = keys[..., outside]
        for begin in range(0, keys.shape[-2], _TOKENS_AT_ONCE):
            tokens = slice(begin, begin + _TOKENS_AT_ONCE)
            angle = slice(None) if len(cos) == 1 else tokens
            window, target = (tensor[..., tokens, rotary.start : stop] for tensor in (keys, out))
            source = window.to(compute)
            turned = target if target.dtype == compute else torch.empty_like(source)
            torch.mul(source, cos[angle], out=turned)
            first, second = _halves(source, rotary.pairing)
            to_first, to_second = _halves(turned, rotary.pairing)
            to_first.addcmul_(second, sin[angle], value=-1)
            to_second.addcmul_(first, sin[angle])
            if turned is not target:
                target.copy_(turned)

    def _table(self, rotary: Rotary, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosine at every channel, [T, R], and the sine of every pair, [T, R / 2]; one row for a run that moves as one."""
        made = self._tables.get((rotary, device, dtype))
        if made is None:
            angles = rotary.angles(self._offsets)
            cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
            made = self._tables[rotary, device, dtype] = _both(cos, rotary.pairing), sin
        return made


def _both(of_pairs: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """A number of each pair [T, R / 2] at both of its channels, [T, R]."""
    if pairing is Pairing.INTERLEAVED:
        return of_pairs.repeat_interleave(2, dim=-1)
    return torch.cat((of_pairs, of_pairs), dim=-1)


def _halves(window: torch.Tensor, pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channel of every pair; views."""
    if pairing is Pairing.INTERLEAVED:
        return window[..., 0::2], window[..., 1::2]
    half = window.shape[-1] // 2
    return window[..., :half], window[..., half:]
