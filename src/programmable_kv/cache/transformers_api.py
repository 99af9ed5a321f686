"""Everything this package relies on inside transformers, in one place.

`tests/cache/test_transformers_api.py` fails when one of these changes shape, and says which.
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
"""the same attention, for models that transformers lets run no attention with `sdpa` in its name (soft-capped scores)"""
_FREQUENCY_BUFFER = "inv_freq"


def cached_layer_types(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(layer type, its cache arguments) for every decoder layer, as transformers' own DynamicCache sees them."""
    types, arguments = get_layer_types_and_kwargs(config)
    return list(zip(types, arguments, strict=True))


def frequency_tables(decoder: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The decoder's rotary frequency buffers by layer type ("" where one table serves all), in radians a position.

    Where the table in use depends on the last forward, it is the one that the model was loaded with, which is kept beside it.
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
    """The decoder inside a causal language model, or the model where `get_decoder` finds something else (a head)."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model


def rope_types(decoder: Any) -> set[str]:
    """The rope types in use. Rotary modules know better than the configuration: some read `dynamic` as a fixed scaling."""
    found: set[str] = set()
    for module in decoder.modules():
        kind = getattr(module, "rope_type", None)
        found.update(kind.values() if isinstance(kind, dict) else [kind] if isinstance(kind, str) else [])
    return found or {str(entry.get("rope_type", "default")) for entry in rope_entries(decoder.config)}


def rope_entries(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration: one, or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return nested or ([dict(parameters)] if parameters else [])


def reset_frequencies(decoder: Any, like: torch.Tensor) -> None:
    """Make rotary modules with dynamic frequencies forget the table that a longer forward may have left in them.

    They keep it for shorter forwards down to the length they were configured for, so that a result would depend on what was
    computed before. A forward of one position sets them back. `like` has the model's device and dtype.
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
    """How many axes a position has: as many as its M-RoPE sections, which some models keep in a module only."""
    found = [entry.get("mrope_section") for entry in rope_entries(decoder.config)]
    for module in decoder.modules():
        sections = getattr(module, "mrope_section", None)
        found += list(sections.values()) if isinstance(sections, dict) else [sections]
    return next((len(sections) for sections in found if sections), 1)


def cached_tensors(cache: Any) -> list[dict[str, torch.Tensor]]:
    """All that each layer of a transformers cache holds, by name; states in a container are `name.key`."""
    layers = []
    # Decoders that could attend to an encoder keep their own tokens in a cache within the cache.
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
    """Whether a model's forward has, or may pass on, `position_ids`. Whether it heeds them is another question."""
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def cache_that_drops_nothing(model: Any) -> DynamicCache | None:
    """An empty cache that keeps every token even in layers with a window; None where layers may keep something else."""
    try:
        kinds = {kind for kind, _ in cached_layer_types(model.config.get_text_config(decoder=True))}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    tokens_only = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
    # Told nothing about the layers, this cache takes each for one that attends to all.
    return DynamicCache() if tokens_only and fills_a_cache(model) else None


def fills_a_cache(model: nn.Module) -> bool:
    """Whether a model's forward takes a cache to fill (some do not make one, but fill what they are given)."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot product attention that never repeats keys and values for their query groups.

    transformers' sdpa path copies the cached keys and values once per query group as soon as a mask is needed,
    which is what happens whenever several tokens are appended to a cache: at 8k tokens that copy costs more
    than the attention itself. Folding the groups into the query rows needs a copy of the (small) mask instead.

    Shapes: query [B, groups * H, T, D]; key, value [B, H, S, D]; returns [B, T, groups * H, D].
    """
    softcap, scaling = kwargs.get("softcap"), kwargs.get("scaling")
    record(query, key, attention_mask, scaling, softcap)
    if softcap is not None:  # which sdpa would leave out
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
    """transformers' mask for sdpa, or None where `grouped_sdpa` makes it block by block: many rows, the last of all slots.

    For `grouped_sdpa` no mask always means that the rows are the last of the slots. transformers also leaves it out for rows
    that are the first of a longer static cache; for those the mask is made here.
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
    """Make `attn_implementation=GROUPED_SDPA` known to transformers. Safe to call more than once."""
    for name in (GROUPED_SDPA, GROUPED_ANY):
        AttentionInterface.register(name, grouped_sdpa)
        AttentionMaskInterface.register(name, mask_unless_tail)
