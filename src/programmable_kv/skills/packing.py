"""Converts a skill to the tensors that are stored, and back.

They are named `keys.I` and `values.I` for layer I ([1, H, n, D], or 8-bit levels with `.scale`), `computed_at` [n],
`frequencies`, `preface_ids`, and `preface`, the preface's text in UTF-8. A preface is stored here and not in the
manifest, because skills that are compiled together have prefaces that grow with their number, and manifests are read
for every listing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from programmable_kv.cache.layout import Rotated
from programmable_kv.cache.segment import Segment
from programmable_kv.errors import CorruptFileError
from programmable_kv.skills.skill import Skill
from programmable_kv.storage.manifests import Entry, preface_digest, shortened
from programmable_kv.storage.quantised import dequantised, quantised
from programmable_kv.storage.tensors import BOTH, CachedShape, LayerShape, TensorCheck

_NAMES = ("computed_at", "frequencies", "preface", "preface_ids")


def packed(skill: Skill, *, int8: bool) -> dict[str, torch.Tensor]:
    """A skill's tensors to store, on the CPU."""
    tensors = {
        "computed_at": skill.segment.computed_at,
        "frequencies": torch.tensor(skill.segment.tables or (), dtype=torch.long),
        "preface": torch.tensor(list(skill.preface.encode()), dtype=torch.uint8),
        "preface_ids": torch.tensor(skill.preface_ids, dtype=torch.int32),
    }
    for index, (keys, values) in enumerate(zip(skill.segment.keys, skill.segment.values, strict=True)):
        if int8:
            tensors |= quantised(f"keys.{index}", keys, over="tokens")
            tensors |= quantised(f"values.{index}", values, over="channels")
        else:
            tensors |= {f"keys.{index}": keys, f"values.{index}": values}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What `unpacked` restores of a skill; the rest is in the manifest."""

    segment: Segment
    preface: str
    preface_ids: tuple[int, ...]


def check_packed(
    tensors: Mapping[str, torch.Tensor],
    entry: Entry,
    shapes: Sequence[LayerShape],
    where: str,
    *,
    limit: int | None = None,
    finite: bool = True,
) -> None:
    """Check that these are the tensors of the skill that a manifest describes.

    Args:
        shapes: the shapes that the model caches in each layer.
        limit: the number of positions of the model.
        finite: also check every number.

    Raises:
        CorruptFileError: the tensors do not match the manifest or the shapes.
    """
    int8 = entry.precision == "int8"
    check = TensorCheck(tensors, where, len(entry.unit.ids), finite)
    stored = [f"{name}.{layer}" for name in BOTH for layer in range(len(shapes))]
    check.names([*_NAMES, *stored, *(f"{name}.scale" for name in stored if int8)])
    check.positions("computed_at", limit)
    check.frequencies(None)
    for layer, shape in enumerate(shapes):
        if int8:
            _check_levels(check, layer, shape)
        else:
            check.cached(layer, shape)
    _preface(tensors, entry, where)


def unpacked(
    tensors: Mapping[str, torch.Tensor],
    entry: Entry,
    shapes: Sequence[LayerShape],
    where: str,
    device: torch.device,
) -> Unpacked:
    """The skill's content from a manifest and its tensors, which `check_packed` must have checked.

    Raises:
        CorruptFileError: the preface does not match the manifest.
    """

    def each(name: str, shape: CachedShape) -> torch.Tensor:
        int8 = entry.precision == "int8"
        return (dequantised(tensors, name, shape.dtype) if int8 else tensors[name]).to(device)

    segment = Segment(
        entry.unit.ids,
        tensors["computed_at"],
        tuple(each(f"keys.{layer}", shape["keys"]) for layer, shape in enumerate(shapes)),
        tuple(each(f"values.{layer}", shape["values"]) for layer, shape in enumerate(shapes)),
        tuple(tensors["frequencies"].tolist()) or None,
    )
    return Unpacked(segment, *_preface(tensors, entry, where))


def _check_levels(check: TensorCheck, layer: int, shape: LayerShape) -> None:
    count = check.count
    for name in BOTH:
        heads, width = shape[name].heads, shape[name].width
        check.shaped(f"{name}.{layer}", (1, heads, count, width), torch.int8)
        scale = (1, heads, 1, width) if name == "keys" else (1, heads, count, 1)
        check.shaped(f"{name}.{layer}.scale", scale, torch.float16)


def _preface(tensors: Mapping[str, torch.Tensor], entry: Entry, where: str) -> tuple[str, tuple[int, ...]]:
    text, ids = tensors["preface"], tensors["preface_ids"]
    if text.dtype != torch.uint8 or ids.dtype != torch.int32 or text.ndim != 1 or ids.ndim != 1:
        raise CorruptFileError(
            f"{where}: the preface is stored as {text.dtype} and {ids.dtype}, not as bytes and token ids"
        )
    found = tuple(ids.tolist())
    if preface_digest(found) != entry.preface_sha256 or len(found) != entry.preface_tokens:
        raise CorruptFileError(f"{where}: the preface does not match the manifest")
    try:
        preface = bytes(text.tolist()).decode()
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{where}: the preface is not UTF-8: {error}") from error
    if shortened(preface) != entry.preface:
        raise CorruptFileError(f"{where}: the preface does not begin with the text in the manifest")
    return preface, found


def shapes_in(tensors: Mapping[str, torch.Tensor], where: str) -> tuple[LayerShape, ...]:
    """The shapes of the stored tensors themselves, used if there is no model to compare them with.

    Raises:
        CorruptFileError: the tensors are not keys and values of layers.
    """
    layers = sum(name.startswith("keys.") and name.count(".") == 1 for name in tensors)
    shapes: list[LayerShape] = []
    for layer in range(layers):
        shape: dict[Rotated, CachedShape] = {}
        for name in BOTH:
            tensor = tensors.get(f"{name}.{layer}")
            if tensor is None or tensor.ndim != 4:
                raise CorruptFileError(
                    f"{where}: the {name} of layer {layer} are missing or do not have four dimensions"
                )
            shape[name] = CachedShape.of(tensor)
        shapes.append(shape)
    if not shapes:
        raise CorruptFileError(f"{where}: there are no keys and values")
    return tuple(shapes)
