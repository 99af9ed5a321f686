"""Checks that saved tensors fit a model's cache, by name, shape, dtype and value, before any state is made of them.

Shapes: B batch (always 1), H key-value heads, n tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from programmable_kv.cache.layout import Rotated
from programmable_kv.engine import Engine
from programmable_kv.errors import CorruptFileError

Tensors = Mapping[str, torch.Tensor]
BOTH: tuple[Rotated, ...] = ("keys", "values")


@dataclass(frozen=True, slots=True)
class CachedShape:
    """The shape and dtype of what one layer caches for a token: [1, heads, 1, width]."""

    heads: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, cached: torch.Tensor) -> CachedShape:
        """The shape of cached keys or values [1, H, n, D]."""
        return cls(cached.shape[1], cached.shape[3], cached.dtype)


LayerShape = Mapping[Rotated, CachedShape]
"""The shapes of a layer's keys and of its values."""


def cached_shapes(engine: Engine) -> tuple[LayerShape, ...]:
    """The shapes that the model caches in every layer, found by computing one token.

    Configurations do not state them for every architecture (MLA, numbers of heads that differ by layer).
    """
    buffer = engine.new_buffer(1)
    engine.append(buffer, [0], logits=0)
    return tuple(
        {"keys": CachedShape.of(buffer.keys(layer)), "values": CachedShape.of(buffer.values(layer))}
        for layer in range(len(buffer))
    )


def read_tensors(source: bytes | Path, where: str) -> dict[str, torch.Tensor]:
    """The named tensors of safetensors bytes, or of a file, which is memory-mapped.

    Raises:
        CorruptFileError: `source` is not a safetensors file.
        FileNotFoundError: the file does not exist.
    """
    try:
        return dict(load(source) if isinstance(source, bytes) else load_file(source))
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        # The file is opened twice, for its header and for the mapping. Another process may remove it in between, for
        # which torch raises a RuntimeError.
        if isinstance(source, Path) and not source.exists():
            raise FileNotFoundError(f"{where} was removed while it was being read") from error
        raise CorruptFileError(f"{where} is not a safetensors file: {error}") from error


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """Checks of the tensors in one file, of `count` tokens, against what a model caches.

    Every method raises CorruptFileError if its check fails. `finite`: also check every number, which reads all tensors.
    """

    tensors: Tensors
    where: str
    count: int
    finite: bool = True

    def names(self, expected: Iterable[str]) -> None:
        """Check that exactly these tensors exist."""
        wanted = set(expected)
        if different := sorted(wanted ^ self.tensors.keys()):
            word = "is missing" if different[0] in wanted else "is unexpected"
            raise CorruptFileError(f"{self.where}: the tensor {different[0]!r} {word} (expected {len(wanted)} tensors)")

    def shaped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Check a tensor's shape and dtype, and with `finite` that its numbers are finite; returns it."""
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CorruptFileError(
                f"{self.where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} of shape "
                f"{shape}"
            )
        if self.finite and dtype.is_floating_point and not _finite(tensor):
            raise CorruptFileError(f"{self.where}: {name} contains NaN or infinity")
        return tensor

    def cached(self, layer: int, shape: LayerShape, *, prefix: str = "", names: Sequence[Rotated] = BOTH) -> None:
        """Check `keys.I` and `values.I` (or one of them) of layer I, [1, H, n, D] each."""
        for name in names:
            each = shape[name]
            self.shaped(f"{prefix}{name}.{layer}", (1, each.heads, self.count, each.width), each.dtype)

    def positions(self, name: str, limit: int | None, *, ascending: bool = True) -> None:
        """Check positions [n]: int64, not negative, below `limit`, and with `ascending` strictly ascending."""
        found = self.shaped(name, (self.count,), torch.long)
        if not self.count:
            return
        lowest, highest = int(found.min()), int(found.max())
        if lowest < 0 or (limit is not None and highest >= limit):
            bound = "" if limit is None else f" and below {limit}"
            raise CorruptFileError(
                f"{self.where}: {name} range from {lowest} to {highest}, but must be at least 0{bound}"
            )
        if ascending and bool((found[1:] <= found[:-1]).any()):
            raise CorruptFileError(f"{self.where}: {name} do not ascend")

    def frequencies(self, rules: int | None) -> None:
        """Check the numbers of the frequency tables: not negative, and one for each of the model's rules, if known."""
        found = self.shaped("frequencies", (self.tensors["frequencies"].numel(),), torch.long)
        if (rules is not None and found.numel() != rules) or bool((found < 0).any()):
            raise CorruptFileError(
                f"{self.where}: frequencies are {found.tolist()[:4]}, but must not be negative, and one for each of the "
                "model's rules"
            )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether every number is finite.

    NaN and infinity show up in the smallest or largest number, which one pass finds. `isfinite(...).all()` makes a
    tensor of booleans first and took 17 to 50 times as long on 2.6 million numbers.
    """
    return tensor.numel() == 0 or all(bool(torch.isfinite(it)) for it in torch.aminmax(tensor))
