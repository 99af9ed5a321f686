"""What each layer of a model caches, read from the model itself into data.

Legend of shapes used across the package: B batch, H key-value heads, S slots, T new tokens, D head dim, L layers.
A *position* is what the rotary embedding and the mask see; a *slot* is where a token lies in the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from programmable_kv.cache.rotation import Rotary
from programmable_kv.cache.transformers_api import cached_layer_types, frequency_tables
from programmable_kv.errors import UnsupportedModelError


class Reach(StrEnum):
    """Which earlier tokens a layer's queries may attend to."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"
    CHUNKED = "chunked_attention"


class PositionEncoding(StrEnum):
    """How a model tells positions apart, as far as its cache is concerned."""

    ROTARY = "rotary"
    LEARNED = "learned"
    NONE_CACHED = "none cached"
    """ALiBi or no encoding at all: nothing in the cache depends on a position."""


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer's cache: its reach (with the window in tokens, if any) and how its keys rotate, if they do."""

    reach: Reach
    window: int | None
    rotary: Rotary | None


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All layers' caches, and what the model's position encoding allows."""

    model_type: str
    layers: tuple[LayerLayout, ...]
    encoding: PositionEncoding
    position_limit: int | None
    """positions the model was configured for (None: not stated)"""
    regime: str | None = None
    """the name of a length-dependent rope type (`dynamic`, `longrope`), for which relocation is not verified"""

    @property
    def reaches(self) -> frozenset[tuple[Reach, int | None]]:
        """The distinct masks that a forward needs."""
        return frozenset((layer.reach, layer.window) for layer in self.layers)

    @classmethod
    def read(cls, model: Any) -> KVLayout:
        """Read the layout of a transformers causal language model.

        Raises:
            UnsupportedModelError: a layer keeps a recurrent state instead of per-token keys and values, or the
                model is not a decoder that transformers caches.
        """
        config = model.config.get_text_config(decoder=True)
        model_type = str(getattr(config, "model_type", type(model).__name__))
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{model_type} is an encoder-decoder: its cross-attention cache is not a token sequence. "
                "Load a decoder-only model."
            )
        try:
            types = cached_layer_types(config)
        except (AttributeError, KeyError, ValueError) as error:
            raise UnsupportedModelError(f"{model_type} does not say what its layers cache ({error}).") from error
        reaches = [_reach(model_type, config, kind, arguments) for kind, arguments in types]
        tables = frequency_tables(model.get_decoder())
        parameters = getattr(config, "rope_parameters", None) or {}
        encoding = PositionEncoding.ROTARY
        if not tables:
            learned = any(name.rpartition(".")[2] in _LEARNED_TABLES for name, _ in model.named_modules())
            encoding = PositionEncoding.LEARNED if learned else PositionEncoding.NONE_CACHED
        rotaries = {key: Rotary.from_table(found[0]) for key, found in tables.items()}
        layers = tuple(
            LayerLayout(reach, window, rotaries.get(kind, rotaries.get("")))
            for (reach, window), (kind, _) in zip(reaches, types, strict=True)
        )
        limit = getattr(config, "max_position_embeddings", None)
        return cls(model_type, layers, encoding, limit, _regime(parameters))


_LEARNED_TABLES = frozenset({"wpe", "embed_positions", "position_embeddings"})
_LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})


def _regime(parameters: dict[str, Any]) -> str | None:
    for entry in (parameters, *parameters.values()):
        if isinstance(entry, dict) and entry.get("rope_type") in _LENGTH_DEPENDENT:
            return str(entry["rope_type"])
    return None


def _reach(model_type: str, config: Any, kind: str, arguments: dict[str, Any]) -> tuple[Reach, int | None]:
    try:
        reach = Reach(kind)
    except ValueError:
        raise UnsupportedModelError(
            f"{model_type} has a layer of type '{kind}', which keeps a state and not the keys and values of each "
            "token, so there is nothing to edit in place. Use an attention-only model, or append updates as text."
        ) from None
    if reach is Reach.FULL:
        return reach, None
    if reach is Reach.SLIDING:
        return reach, int(arguments.get("sliding_window") or config.sliding_window)
    return reach, int(config.attention_chunk_size)
