"""The slow, obvious references that the package is compared with: full forwards with transformers' own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from programmable_kv import Notebook
from programmable_kv.cache.buffer import KVBuffer

Layers = list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def full_forward(model: Any, ids: Sequence[int]) -> tuple[Layers, torch.Tensor]:
    """(keys and values of every layer, logits of every token) of a prefill by transformers alone."""
    # Without a config, no layer drops tokens outside its window, so all tokens can be compared.
    cache = DynamicCache()
    output = model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers], output.logits[0]


def assert_rows_equal(
    buffer: KVBuffer, expected: Layers, slots: Sequence[int], *, atol: float, of: Sequence[int] | None = None
) -> None:
    """Assert that the buffer's rows in `slots` equal the expected rows `of` (the same slots if None), in all layers."""
    theirs = list(slots if of is None else of)
    for index, (keys, values) in enumerate(expected):
        for name, ours, reference in (("keys", buffer.keys(index), keys), ("values", buffer.values(index), values)):
            difference = (ours[:, :, list(slots)] - reference[:, :, theirs]).abs()
            worst = float(difference.max()) if difference.numel() else 0.0
            slot = list(slots)[int(difference.amax(dim=(0, 1, 3)).argmax())] if difference.numel() else -1
            assert worst <= atol, f"layer {index}: {name} differ by {worst:.2e}, most at slot {slot}"


def largest_difference(buffer: KVBuffer, expected: Layers, slots: Sequence[int]) -> float:
    """The largest difference between the buffer's rows and the expected ones, over layers, keys and values."""
    return max(
        float((ours[:, :, list(slots)] - theirs[:, :, list(slots)]).abs().max())
        for index, pair in enumerate(expected)
        for ours, theirs in zip((buffer.keys(index), buffer.values(index)), pair, strict=True)
    )


@torch.no_grad()
def row_forward(model: Any, buffer: KVBuffer, slot: int, token: int) -> Layers:
    """Keys and values of a token in every layer, computed by transformers alone on the buffer's rows before `slot`."""
    cache = DynamicCache()
    for layer in range(len(buffer)):
        cache.update(buffer.keys(layer)[:, :, :slot], buffer.values(layer)[:, :, :slot], layer)
    model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    return [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]


def assert_same(one: Notebook, two: Notebook) -> None:
    """Assert that two notebooks have the same text, fields, states, keys and values."""
    assert one.ids == two.ids
    assert one.fields == two.fields
    assert one.states == two.states
    assert one.rendered_text == two.rendered_text
    for layer in range(len(one.cache)):
        assert torch.equal(one.cache.keys(layer), two.cache.keys(layer))
        assert torch.equal(one.cache.values(layer), two.cache.values(layer))
