"""Prefill of tokens with nothing before them, with transformers' own cache: the reference for proofs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from programmable_kv.cache.transformers_api import (
    Cache,
    DynamicCache,
    cache_that_drops_nothing,
    cached_tensors,
    fills_a_cache,
    takes_positions,
)
from programmable_kv.errors import UnsupportedModelError
from programmable_kv.verify.relocation import CachedLayer


@torch.no_grad()
def prefill_alone(
    model: Any, ids: Sequence[int], positions: torch.Tensor | None, *, padding: int = 0
) -> list[CachedLayer]:
    """Prefill with transformers' own cache, whatever its layers store; returns each layer's tensors by name.

    `positions` is [T], [A, T] for A position axes, or None to let the model count. The first `padding` ids are masked
    out. Tensors with three dimensions get a heads dimension: per-token tensors are [B, H, T, D].

    Raises:
        UnsupportedModelError: the model returns no cache.
    """
    device = next(model.parameters()).device
    mask = torch.ones(1, len(ids), dtype=torch.long, device=device)
    mask[:, :padding] = 0
    arguments: dict[str, Any] = {}
    if positions is not None and takes_positions(model):
        arguments["position_ids"] = (positions[None] if positions.ndim == 1 else positions[:, None]).to(device)
    arguments |= {"input_ids": torch.tensor([list(ids)], device=device), "attention_mask": mask, "use_cache": True}
    empty = cache_that_drops_nothing(model)
    if empty is not None:
        arguments["past_key_values"] = empty
    output = model(**arguments)
    cache = output.get("past_key_values", output.get("cache_params"))
    if cache is None and empty is None and fills_a_cache(model):
        cache = arguments["past_key_values"] = DynamicCache(config=model.config)
        model(**arguments)
    if not isinstance(cache, Cache):
        raise UnsupportedModelError(
            f"{model.config.model_type} does not return a transformers `Cache`, so there is nothing to relocate."
        )
    return [
        {name: tensor[:, None] if tensor.ndim == 3 else tensor for name, tensor in layer.items()}
        for layer in cached_tensors(cache)
    ]
