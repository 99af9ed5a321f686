"""RoPE as one rotation by an offset.

A rotary key at position p is k_p = s R(p) k, where R(p) rotates each channel pair i by the angle p f_i. Rotations
compose, R(p + d) = R(d) R(p), so moving a cached key by d positions is one rotation by d f_i. The factor s that
YaRN-style models multiply into cos and sin is already in the key and must not be applied again.
Source: Su et al., RoFormer, section 3.2 (arXiv 2104.09864).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch

_TOKENS_AT_ONCE = 1024
"""Tokens rotated at once: few enough that tensors read or written twice are still in the CPU cache the second time."""


class Pairing(StrEnum):
    """Which two channels rotate together: i with i + R/2, or 2i with 2i + 1 (R rotary channels)."""

    HALF_SPLIT = "half-split"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, slots=True)
class Rotary:
    """How one layer's keys rotate: which channels, how they are paired, at which frequencies (radians per position)."""

    frequencies: tuple[float, ...]
    start: int = 0
    pairing: Pairing = Pairing.HALF_SPLIT
    axes: tuple[int, ...] = ()
    """with several position axes (M-RoPE: time, height, width), the axis of each frequency; empty with one axis"""

    @classmethod
    def from_table(cls, table: torch.Tensor) -> Rotary:
        """Make one from a model's frequency buffer [R / 2], whose values are converted to float64."""
        return cls(tuple(table.detach().to("cpu", torch.float64).tolist()))

    @property
    def width(self) -> int:
        """R, the number of rotary channels."""
        return 2 * len(self.frequencies)

    def paired(self, pairing: Pairing) -> Rotary:
        return replace(self, pairing=pairing)

    def angles(self, offsets: torch.Tensor) -> torch.Tensor:
        """Radians in float64, [T, R / 2], for offsets [T] (the same on every axis) or [A, T] (one row per axis)."""
        # MPS has no float64, so the angles (T x R/2 numbers) are computed on the CPU.
        moved = offsets.to("cpu", torch.float64)
        if moved.ndim == 1:
            moved = moved[:, None]
        elif self.axes:
            moved = moved[list(self.axes)].T
        else:
            raise ValueError("this rotation has only one axis: give one offset for each token, [T]")
        return moved * torch.tensor(self.frequencies, dtype=torch.float64)


def rotate(keys: torch.Tensor, offsets: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Keys [..., T, D] rotated by `offsets` positions ([T], or [A, T] with one row per axis), in a new tensor."""
    result = torch.empty_like(keys)
    Rotation(offsets).put(keys, rotary, result)
    return result


class Rotation:
    """Rotates the same tokens by `offsets` positions in any number of layers.

    The angles of a `Rotary` are computed once, and their cosines and sines taken, in float64, so large offsets lose no
    precision. The rotation runs in float32 or the keys' dtype, whichever is wider, with one rounding at the end.
    """

    def __init__(self, offsets: torch.Tensor) -> None:
        """`offsets`: [T] integer positions to move each token by (may be negative), or [A, T] with one row per axis."""
        if offsets.ndim == 1 and offsets.numel() and bool((offsets == offsets[0]).all()):
            offsets = offsets[:1]  # all tokens move by the same offset: one angle per channel pair is enough
        self._offsets = offsets
        self._tables: dict[tuple[Rotary, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def put(self, keys: torch.Tensor, rotary: Rotary | None, out: torch.Tensor) -> None:
        """Write a layer's keys [..., T, D] into `out`, rotated; unchanged if `rotary` is None.

        `out` has the shape and dtype of `keys` and must not share memory with them. Channels outside the rotary window
        are copied.
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
        """The cosine of every channel, [T, R], and the sine of every pair, [T, R / 2]; T is 1 for a common offset."""
        made = self._tables.get((rotary, device, dtype))
        if made is None:
            angles = rotary.angles(self._offsets)
            cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
            made = self._tables[rotary, device, dtype] = _both(cos, rotary.pairing), sin
        return made


def _both(of_pairs: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """Repeat a number for each pair, [T, R / 2], at both channels of the pair: [T, R]."""
    if pairing is Pairing.INTERLEAVED:
        return of_pairs.repeat_interleave(2, dim=-1)
    return torch.cat((of_pairs, of_pairs), dim=-1)


def _halves(window: torch.Tensor, pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channel of every pair; views."""
    if pairing is Pairing.INTERLEAVED:
        return window[..., 0::2], window[..., 1::2]
    half = window.shape[-1] // 2
    return window[..., :half], window[..., half:]
