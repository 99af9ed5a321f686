"""Everything that this package uses from transformers' internals, in one place.

`tests/cache/test_transformers_api.py` fails when one of these internals changes, and says which.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from programmable_kv.cache.attention import ROWS_IN_BLOCK, in_blocks, last_rows, record, soft_capped, tail_mask

__all__ = [
    "GROUPED_ANY",
    "GROUPED_SDPA",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "cache_that_drops_nothing",
    "cached_layer_types",
    "cached_tensors",
    "decoder_of",
    "fills_a_cache",
    "frequency_tables",
    "grouped_sdpa",
    "position_axes",
    "register_attention",
    "reset_frequencies",
    "rope_entries",
    "rope_types",
    "takes_positions",
]

GROUPED_SDPA = "pkv_grouped_sdpa"
GROUPED_ANY = "pkv_grouped"
"""The same attention for models (with soft-capped scores) on which transformers rejects names that contain `sdpa`."""
_FREQUENCY_BUFFER = "inv_freq"


def cached_layer_types(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(layer type, its cache arguments) for every decoder layer, as in transformers' own DynamicCache."""
    types, arguments = get_layer_types_and_kwargs(config)
    return list(zip(types, arguments, strict=True))


def frequency_tables(decoder: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The decoder's rotary frequency buffers by layer type ("" for a table of all layers), in radians per position.

    If the table in use depends on the last forward, the result has the table that the model was loaded with, which the
    module keeps in a second buffer.
    """
    found: dict[str, list[torch.Tensor]] = {}
    buffers = dict(decoder.named_buffers())
    for name in buffers:
        module, _, leaf = name.rpartition(".")
        original = leaf.removesuffix(_FREQUENCY_BUFFER) + "original_" + _FREQUENCY_BUFFER
        tensor = buffers.get(f"{module}.{original}" if module else original, buffers[name])
        if leaf == _FREQUENCY_BUFFER:
            found.setdefault("", []).append(tensor)
        elif leaf.endswith("_" + _FREQUENCY_BUFFER) and "original" not in leaf:
            found.setdefault(leaf.removesuffix("_" + _FREQUENCY_BUFFER), []).append(tensor)
    return found


def decoder_of(model: Any) -> Any:
    """The decoder inside a causal language model, or the model itself if `get_decoder` returns no model (a head)."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model


def rope_types(decoder: Any) -> set[str]:
    """The rope types in use, from the rotary modules if they state one: some treat a configured `dynamic` as fixed."""
    found: set[str] = set()
    for module in decoder.modules():
        kind = getattr(module, "rope_type", None)
        found.update(kind.values() if isinstance(kind, dict) else [kind] if isinstance(kind, str) else [])
    return found or {str(entry.get("rope_type", "default")) for entry in rope_entries(decoder.config)}


def rope_entries(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration: one entry, one for each layer type, or none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return nested or ([dict(parameters)] if parameters else [])


def reset_frequencies(decoder: Any, like: torch.Tensor) -> None:
    """Reset rotary modules with dynamic frequencies, which may still have the table of an earlier, longer forward.

    They use that table for shorter forwards too, down to the configured length, so a result would depend on what was
    computed before. A forward of one position resets them. `like` is a tensor with the model's device and dtype.
    """
    first = torch.zeros(1, 1, dtype=torch.long, device=like.device)
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        if not hasattr(module, "original_max_seq_len"):
            continue
        if isinstance(kinds, str) and "dynamic" in kinds:
            module(like, first)
        elif isinstance(kinds, dict):
            for layer_type in (name for name, kind in kinds.items() if "dynamic" in kind):
                module(like, first, layer_type)


def position_axes(decoder: Any) -> int:
    """The number of position axes: one for each M-RoPE section, which some models state only in a module; else 1."""
    found = [entry.get("mrope_section") for entry in rope_entries(decoder.config)]
    for module in decoder.modules():
        sections = getattr(module, "mrope_section", None)
        found += list(sections.values()) if isinstance(sections, dict) else [sections]
    return next((len(sections) for sections in found if sections), 1)


def cached_tensors(cache: Any) -> list[dict[str, torch.Tensor]]:
    """All floating-point tensors in each layer of a transformers cache, by name; `name.key` for those in a dict."""
    layers = []
    # Decoders with optional cross-attention keep their own tokens in a cache inside the cache.
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        found: dict[str, torch.Tensor] = {}
        for name, held in vars(layer).items():
            members = held.items() if isinstance(held, dict) else [("", held)]
            for key, tensor in members:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                    found[f"{name}.{key}" if isinstance(held, dict) else name] = tensor
        layers.append(found)
    return layers


def takes_positions(model: nn.Module) -> bool:
    """Whether a model's forward accepts `position_ids`, by name or as a keyword argument. It may still ignore them."""
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def cache_that_drops_nothing(model: Any) -> DynamicCache | None:
    """An empty cache that keeps every token, even in layers with a window; None if the model may not work with it."""
    try:
        kinds = {kind for kind, _ in cached_layer_types(model.config.get_text_config(decoder=True))}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    tokens_only = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
    # Without a configuration, this cache treats every layer as one with full attention.
    return DynamicCache() if tokens_only and fills_a_cache(model) else None


def fills_a_cache(model: nn.Module) -> bool:
    """Whether a model's forward accepts a cache to fill (some models create none, but fill the one passed to them)."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot product attention that does not copy keys and values for each query group.

    transformers' sdpa path copies the cached keys and values once per query group when a mask is needed, which is
    always the case when several tokens are appended to a cache. At 8k tokens that copy costs more than the attention
    itself. Folding the groups into the query rows copies only the (small) mask.

    Shapes: query [B, groups * H, T, D]; key, value [B, H, S, D]; returns [B, T, groups * H, D].
    """
    softcap, scaling = kwargs.get("softcap"), kwargs.get("scaling")
    record(query, key, attention_mask, scaling, softcap)
    if softcap is not None:  # sdpa would ignore it
        return soft_capped(query, key, value, attention_mask, scaling, softcap), None
    groups, tokens, slots = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    mask, biased = attention_mask, kwargs.get("position_bias") is not None
    if mask is None and 1 < tokens < slots:  # see `mask_unless_tail`
        if not biased:
            return last_rows(query, key, value, scaling), None
        mask = tail_mask(tokens, slots, query.device)[None, None]
    shared = mask is not None and mask.shape[1] == 1
    many = shared and tokens > ROWS_IN_BLOCK and mask.shape[0] == 1 and mask.dtype == torch.bool  # type: ignore[union-attr]
    if many and not biased:
        return in_blocks(query, key, value, mask, scaling), None
    if biased or groups == 1 or tokens == 1 or not shared:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    batch, _, _, width = query.shape
    mask = mask[..., :slots]  # type: ignore[index]
    mask = mask.expand(-1, groups, -1, -1).reshape(mask.shape[0], 1, groups * tokens, mask.shape[-1])
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * tokens, width),
        key,
        value,
        attn_mask=mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=scaling,
    )
    output = output.reshape(batch, query.shape[1], tokens, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def mask_unless_tail(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask for sdpa, or None for many rows in the last slots: `grouped_sdpa` then masks block by block.

    For `grouped_sdpa`, None always means that the rows occupy the last slots. transformers also omits the mask for rows
    at the start of a longer static cache; for those this function makes the mask.
    """
    plain = allow_is_causal_skip and mask_function is causal_mask_function and attention_mask is None
    last = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    if plain and last and q_length > ROWS_IN_BLOCK:
        return None
    skip = allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
    return sdpa_mask(  # type: ignore[no-any-return]
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=skip,
        **kwargs,
    )


def register_attention() -> None:
    """Register `GROUPED_SDPA` and `GROUPED_ANY` with transformers. Safe to call more than once."""
    for name in (GROUPED_SDPA, GROUPED_ANY):
        AttentionInterface.register(name, grouped_sdpa)
        AttentionMaskInterface.register(name, mask_unless_tail)
