"""Quantises cached numbers to eight bits: keys with one scale per channel, values with one scale per token.

Keys have channels that are large for every token, and values do not; hence the two directions.
Source: Liu et al., KIVI (arXiv 2402.02750), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

_LEVELS = 127


def quantised(name: str, tensor: torch.Tensor, *, over: Literal["tokens", "channels"]) -> dict[str, torch.Tensor]:
    """Named int8 levels of a tensor [B, H, n, D] and their float16 scales, which are shared over tokens or channels."""
    dim = -2 if over == "tokens" else -1
    largest = tensor.float().abs().amax(dim=dim, keepdim=True).clamp_min(1e-8)
    # The scale is rounded up in float16, so that no level exceeds the range.
    scale = torch.nextafter((largest / _LEVELS).half(), torch.tensor(float("inf"), dtype=torch.float16))
    levels = (tensor.float() / scale.float()).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return {name: levels, f"{name}.scale": scale}


def dequantised(named: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that was passed to `quantised`, to within half a level."""
    return (named[name].float() * named[f"{name}.scale"].float()).to(dtype)
