"""Attention in blocks of rows equals attention in one call; and who makes the mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from conftest import tiny_engine, tiny_model
from programmable_kv.cache.attention import ROWS_IN_BLOCK, in_blocks, last_rows, tail_mask
from programmable_kv.cache.layout import Reach
from programmable_kv.cache.masks import visible
from programmable_kv.cache.transformers_api import GROUPED_SDPA, grouped_sdpa, mask_unless_tail, register_attention
from programmable_kv.engine import Engine, Rows
from reference import assert_rows_equal, full_forward

CPU = torch.device("cpu")


def tensors(tokens: int, slots: int, groups: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, 2 * groups, tokens, 8), (1, 2, slots, 8), (1, 2, slots, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("width", [6, 8])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("tokens", [2, ROWS_IN_BLOCK, ROWS_IN_BLOCK + 1, 700])
@pytest.mark.parametrize("kind", ["tail", "window", "scattered", "no mask"])
def test_blocks_equal_one_call(kind: str, tokens: int, groups: int, width: int) -> None:
    slots = tokens + 90
    query, key, value = tensors(tokens, slots, groups, width)
    positions = torch.arange(slots - tokens, slots)
    if kind == "scattered":
        positions = torch.randperm(slots, generator=torch.Generator().manual_seed(2))[:tokens].sort().values
    reach, window = (Reach.SLIDING, 40) if kind == "window" else (Reach.FULL, None)
    mask = visible(positions, torch.arange(slots), reach, window)[None, None]
    expected = scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=mask, scale=0.4
    ).transpose(1, 2)
    given = None if kind == "no mask" else mask
    torch.testing.assert_close(in_blocks(query, key, value, given, 0.4), expected, rtol=0, atol=1e-12)
    if kind == "no mask":
        torch.testing.assert_close(last_rows(query, key, value, 0.4), expected, rtol=0, atol=1e-12)
    if groups > 1 or tokens > ROWS_IN_BLOCK or given is None:  # otherwise transformers' own attention runs
        found, _ = grouped_sdpa(torch.nn.Module(), query, key, value, given, scaling=0.4)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_mask_is_left_out_for_many_last_rows_only() -> None:
    many = ROWS_IN_BLOCK + 1
    common = {"batch_size": 1, "device": CPU}
    assert mask_unless_tail(q_length=many, kv_length=many + 9, q_offset=9, **common) is None
    assert mask_unless_tail(q_length=many, kv_length=many, **common) is None
    assert mask_unless_tail(q_length=1, kv_length=9, q_offset=8, **common) is None
    window = sliding_window_causal_mask_function(5)
    for length, slots, offset, more in (
        (ROWS_IN_BLOCK, many + 9, many + 9 - ROWS_IN_BLOCK, {}),
        (many, many + 9, 0, {}),  # the first rows of a static cache
        (many, many + 9, 4, {}),
        (many, many + 9, torch.tensor(9), {}),
        (many, many + 9, 9, {"mask_function": window, "local_size": 5}),
        (many, many + 9, 9, {"allow_is_causal_skip": False}),
        (many, many + 9, 9, {"attention_mask": torch.ones(1, many + 9, dtype=torch.bool).tril(-1)}),
    ):
        arguments = {"q_length": length, "kv_length": slots, "q_offset": offset, **common, **more}
        made = mask_unless_tail(**arguments)
        assert made is not None
        assert torch.equal(made, sdpa_mask(**{**arguments, "allow_is_causal_skip": False}))
    assert torch.equal(
        tail_mask(3, 7, CPU),
        sdpa_mask(1, 3, 7, 4, mask_function=causal_mask_function, allow_is_causal_skip=False)[0, 0],
    )


def test_a_long_suffix_and_long_chunks_equal_a_full_forward(model_type: str) -> None:
    """More rows than fit one block, in every architecture: appended in chunks, recomputed, and scattered."""
    if model_type == "gemma2":
        pytest.skip("eager only")
    register_attention()
    ids = [int(i) for i in torch.randint(3, 500, (900,), generator=torch.Generator().manual_seed(8))]
    engine = Engine(tiny_model(model_type, GROUPED_SDPA))
    expected, logits = full_forward(tiny_engine(model_type).model, ids)
    buffer = engine.new_buffer()
    engine.append(buffer, ids, chunk=400, logits=0)
    assert_rows_equal(buffer, expected, range(900), atol=1e-9)
    slots = tuple(range(300, 900))
    last = engine.compute(buffer, Rows(tuple(ids[300:]), slots, slots))
    assert_rows_equal(buffer, expected, range(900), atol=1e-9)
    torch.testing.assert_close(last[0], logits[-1], rtol=0, atol=1e-8)
    scattered = tuple(range(0, 899, 2))
    engine.compute(buffer, Rows(tuple(ids[slot] for slot in scattered), scattered, scattered), logits=0)
    assert_rows_equal(buffer, expected, range(900), atol=1e-9)


def test_many_rows_after_a_hole_see_positions(model_type: str) -> None:
    if model_type == "gemma2":
        pytest.skip("eager only")
    register_attention()
    ids = tuple(int(i) for i in torch.randint(3, 500, (600,), generator=torch.Generator().manual_seed(9)))
    positions = (*range(100), *range(105, 605))
    outputs = []
    for attention in ("sdpa", GROUPED_SDPA):
        engine = Engine(tiny_model(model_type, attention))
        buffer = engine.new_buffer()
        engine.compute(buffer, Rows(ids[:100], tuple(range(100)), positions[:100]), logits=0)
        outputs.append(engine.compute(buffer, Rows(ids[100:], tuple(range(100, 600)), positions[100:]), logits=500))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-8)
