"""Finds a decoder's layers, their attention modules and output projections, and the final norm.

Used to intervene in a forward. They are found by inspecting the modules; a model in which one is not found is refused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from programmable_kv.cache.transformers_api import decoder_of
from programmable_kv.errors import UnsupportedModelError

_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj", "wo")
_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "final_norm", "ln_f", "norm_f")


@dataclass(frozen=True, slots=True, eq=False)
class DecoderModules:
    """The modules of a decoder: one entry for each layer, in order."""

    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    projections: tuple[nn.Module, ...]
    """the output projections, which mix the heads' outputs; their input is [B, T, heads * D_v]"""
    final_norm: nn.Module
    heads: int
    """query heads of each layer"""

    @classmethod
    def of(cls, model: Any) -> DecoderModules:
        """
        Raises:
            UnsupportedModelError: a layer's attention, its output projection or the final norm was not found.
        """
        decoder = decoder_of(model)
        config = model.config.get_text_config(decoder=True)
        count = int(config.num_hidden_layers)
        stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        found = [(tuple(stack), _attentions(stack)) for stack in stacks]
        whole = [(layers, attentions) for layers, attentions in found if None not in attentions]
        norms = [child for name, child in decoder.named_children() if name in _FINAL_NORMS]
        if len(whole) != 1 or len(norms) != 1:
            raise UnsupportedModelError(
                f"{config.model_type} does not have exactly one stack of {count} layers with one attention each, and "
                f"one final norm (found {len(whole)} and {len(norms)}), so its forwards cannot be intervened in."
            )
        layers, attentions = whole[0]
        projections = [_projection(attention) for attention in attentions]
        if None in projections:
            raise UnsupportedModelError(
                f"the attention of {config.model_type} has no output projection with a known name "
                f"({', '.join(_PROJECTIONS)})"
            )
        return cls(layers, attentions, tuple(projections), norms[0], int(config.num_attention_heads))  # type: ignore[arg-type]


def _attentions(stack: nn.ModuleList) -> tuple[nn.Module | None, ...]:
    """For each layer, the one innermost module that takes a mask and has a `layer_idx`; None if there is not one."""
    found: list[nn.Module | None] = []
    for layer in stack:
        takes = [m for m in layer.modules() if m is not layer and hasattr(m, "layer_idx") and _takes_mask(m)]
        inner = [m for m in takes if not any(other is not m and other in set(m.modules()) for other in takes)]
        found.append(inner[0] if len(inner) == 1 else None)
    return tuple(found)


def _takes_mask(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


def _projection(attention: nn.Module | None) -> nn.Module | None:
    assert attention is not None
    children = dict(attention.named_children())
    return next((children[name] for name in _PROJECTIONS if name in children), None)
