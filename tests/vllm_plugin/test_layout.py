"""Keys and values in paged caches of every layout that vLLM has for them, read back number by number; others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from programmable_kv.cache.span import Span
from programmable_kv.errors import UnsupportedModelError
from programmable_kv.vllm_plugin.layout import paged_layer
from programmable_kv.vllm_plugin.matching import slots_of

BLOCKS, HEADS, TOKENS, WIDTH = 6, 3, 8, 4
LAYOUTS = {
    "heads first": (0, 1, 2, 3),
    "tokens first": (0, 2, 1, 3),
    "heads outermost": (1, 0, 2, 3),
}
"""the order of [B, H, N, C] in memory"""


def cache_in(order: tuple[int, ...], blocks: int = BLOCKS, tokens: int = TOKENS) -> torch.Tensor:
    """A cache of zeros, [B, H, N, C], whose numbers lie in that order in memory."""
    shape = (blocks, HEADS, tokens, 2 * WIDTH)
    memory = torch.zeros([shape[axis] for axis in order])
    return memory.permute([order.index(axis) for axis in range(4)])


def layer(cache: torch.Tensor, backend: str = "FLASH_ATTN", **changes: Any) -> Any:
    given: dict[str, Any] = {"heads": HEADS, "width": WIDTH, "block_size": TOKENS, "dtype": torch.float32, **changes}
    return paged_layer("model.layers.0.attn", backend, cache, **given)


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(HEADS, count, WIDTH, generator=generator), torch.randn(HEADS, count, WIDTH, generator=generator)


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"])
@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS)
def test_each_token_lies_in_its_block(order: tuple[int, ...], backend: str) -> None:
    cache = cache_in(order)
    keys, values = tokens(13)
    blocks, span = [5, 0, 3], Span(6, 19)
    layer(cache, backend).write(keys, values, torch.tensor(slots_of(blocks, span, TOKENS)))
    for number, token in enumerate(span.range):
        there = cache[blocks[token // TOKENS], :, token % TOKENS]
        assert torch.equal(there, torch.cat((keys[:, number], values[:, number]), dim=-1)), token
    assert int((cache != 0).any(dim=-1).any(dim=1).sum()) == 13, "something else was written to"


def test_blocks_of_the_kernel_may_be_parts_of_the_schedulers() -> None:
    fine, coarse = cache_in((0, 1, 2, 3), blocks=12, tokens=4), cache_in((0, 1, 2, 3))
    keys, values = tokens(13)
    slots = torch.tensor(slots_of([5, 0, 3], Span(6, 19), TOKENS))
    layer(fine).write(keys, values, slots)
    layer(coarse).write(keys, values, slots)
    halves = fine.unflatten(0, (BLOCKS, 2)).transpose(1, 2).flatten(2, 3)
    assert torch.equal(halves, coarse)


def test_packed_blocks_are_left_to_the_engines_function() -> None:
    """The function gets the two halves of each block, as vLLM's CPU attention cuts them, and writes into the cache itself."""
    cache = cache_in((0, 1, 2, 3))
    keys, values = tokens(5)
    slots = torch.tensor([8, 9, 10, 40, 41])

    def write(k: Any, v: Any, of_keys: torch.Tensor, of_values: torch.Tensor, where: Any) -> None:
        assert k.shape == v.shape == (5, HEADS, WIDTH)
        assert k.is_contiguous()
        assert v.is_contiguous()
        for each, target in ((k, of_keys), (v, of_values)):
            target[where // TOKENS, :, where % TOKENS] = each

    layer(cache, "CPU_ATTN", write_packed=write).write(keys, values, slots)
    block = cache[1].reshape(HEADS, 2 * TOKENS, WIDTH)
    assert torch.equal(block[:, :3], keys[:, :3])
    assert torch.equal(block[:, TOKENS : TOKENS + 3], values[:, :3])


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "of five dimensions": (torch.zeros(2, BLOCKS, TOKENS, HEADS, WIDTH), {}, "expected .blocks"),
    "other heads": (cache_in((0, 1, 2, 3)), {"heads": 1}, "expected .blocks"),
    "another width": (cache_in((0, 1, 2, 3)), {"width": 8}, "expected .blocks"),
    "another dtype": (cache_in((0, 1, 2, 3)).half(), {}, "kv-cache-dtype"),
    "other blocks": (cache_in((0, 1, 2, 3)), {"block_size": 12}, "is not a multiple"),
    "numbers apart": (cache_in((0, 1, 3, 2)), {}, "must be contiguous"),
    "one block shown as many": (
        torch.zeros(1, HEADS, TOKENS, 2 * WIDTH).expand(BLOCKS, -1, -1, -1),
        {},
        "must be contiguous",
    ),
    "another attention": (cache_in((0, 1, 2, 3)), {"backend": "FLASHMLA"}, "known backends are CPU_ATTN"),
    "packed without the engine": (cache_in((0, 1, 2, 3)), {"backend": "CPU_ATTN"}, "known backends are"),
    "packed out of order": (
        cache_in((0, 2, 1, 3)),
        {"backend": "CPU_ATTN", "write_packed": lambda *_: None},
        "must be in order",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unknown_layout_is_refused(name: str) -> None:
    cache, changes, said = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=said):
        layer(cache, **changes)
