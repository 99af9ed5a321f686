"""Everything this package relies on inside transformers, in one place.

`tests/cache/test_transformers_api.py` fails when one of these changes shape, and says which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

__all__ = [
    "GROUPED_SDPA",
    "Cache",
    "CacheLayerMixin",
    "cached_layer_types",
    "frequency_tables",
    "grouped_sdpa",
    "register_attention",
]

GROUPED_SDPA = "pkv_grouped_sdpa"
_FREQUENCY_BUFFER = "inv_freq"


def cached_layer_types(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(layer type, its cache arguments) for every decoder layer, as transformers' own DynamicCache sees them."""
    types, arguments = get_layer_types_and_kwargs(config)
    return list(zip(types, arguments, strict=True))


def frequency_tables(decoder: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The decoder's rotary frequency buffers by layer type ("" where one table serves all), in radians a position."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in decoder.named_buffers():
        leaf = name.rpartition(".")[2]
        if leaf == _FREQUENCY_BUFFER:
            found.setdefault("", []).append(tensor)
        elif leaf.endswith("_" + _FREQUENCY_BUFFER) and "original" not in leaf:
            found.setdefault(leaf.removesuffix("_" + _FREQUENCY_BUFFER), []).append(tensor)
    return found


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
    groups = query.shape[1] // key.shape[1]
    tokens = query.shape[2]
    plain = groups == 1 or tokens == 1 or attention_mask is None or attention_mask.shape[1] != 1
    if plain or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    batch, _, _, width = query.shape
    mask = attention_mask[..., : key.shape[2]]  # type: ignore[index]
    mask = mask.expand(-1, groups, -1, -1).reshape(mask.shape[0], 1, groups * tokens, mask.shape[-1])
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * tokens, width),
        key,
        value,
        attn_mask=mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    output = output.reshape(batch, query.shape[1], tokens, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make `attn_implementation=GROUPED_SDPA` known to transformers. Safe to call more than once."""
    AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
    AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
