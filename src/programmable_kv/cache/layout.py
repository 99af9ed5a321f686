"""The layout of a model's cache as data: what each layer caches, read from the loaded model.

Legend of shapes used across the package: B batch, H key-value heads, S slots, T new tokens, D head dim, L layers,
A position axes (one, or three with M-RoPE). A *position* is what the rotary embedding and the mask see; a *slot* is
where a token lies in the buffer.

This module reads what the configuration and the modules state. What they do not state (how channels are paired, where
the rotary window starts, whether a layer rotates at all) is measured on the model's own keys, in `verify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from programmable_kv.cache.frequencies import FrequencyRule
from programmable_kv.cache.rotation import Rotary
from programmable_kv.cache.transformers_api import (
    cached_layer_types,
    decoder_of,
    frequency_tables,
    position_axes,
    rope_entries,
    rope_types,
)
from programmable_kv.errors import UnsupportedModelError

Rotated = Literal["keys", "values"]


class Reach(StrEnum):
    """Which earlier tokens a layer's queries may attend to."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"
    CHUNKED = "chunked_attention"


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer's cache: its reach (with the window in tokens, if any) and how its tensors rotate with the position."""

    reach: Reach
    window: int | None
    rotary: Rotary | None
    """how the keys rotate; None if they do not depend on the position"""
    kind: str = Reach.FULL.value
    """the layer's type in transformers' terms, which distinguishes recurrent states from per-token caches"""
    others: tuple[tuple[str, Rotary], ...] = ()
    """(cached tensor, its rotation) for other tensors that rotate: MLA caches its rotary keys as `values`"""

    @property
    def rotated(self) -> Rotated:
        """Which of the two cached tensors rotates: `values` with MLA, else `keys` (also if neither rotates)."""
        return "values" if self.rotary is None and "values" in dict(self.others) else "keys"

    @property
    def rotation(self) -> Rotary | None:
        """How the tensor named by `rotated` rotates; None if it does not."""
        return self.rotary if self.rotated == "keys" else dict(self.others)["values"]

    @property
    def rotates_more(self) -> bool:
        """Whether another cached tensor rotates too."""
        return bool(dict(self.others).keys() - {self.rotated})


@dataclass(frozen=True, slots=True)
class Regime:
    """A bound on positions within which relocation can be exact, and what changes beyond it."""

    name: str
    within: int
    changes_frequencies: bool = True
    """True if the frequencies change beyond the bound; False if the tokens that see each other do"""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The caches of all layers, and what the model states about its positions."""

    model_type: str
    layers: tuple[LayerLayout, ...]
    position_limit: int | None
    """the number of positions that the model is configured for; None if not stated"""
    regime: Regime | None = None
    """the tightest bound within which relocation can be exact"""
    frequency_rules: tuple[FrequencyRule, ...] = ()
    """how the frequencies depend on the length of a forward; empty if they do not"""
    axes: int = 1
    """the number of position axes of the rotary embedding"""
    tables: tuple[Rotary, ...] = ()
    """every frequency table found in the model, for layers whose own table cannot be found by their type"""

    @property
    def reaches(self) -> frozenset[tuple[Reach, int | None]]:
        """The distinct (reach, window) pairs; a forward needs one mask for each."""
        return frozenset((layer.reach, layer.window) for layer in self.layers)

    def require_tokens_only(self) -> None:
        """
        Raises:
            UnsupportedModelError: a layer caches something other than keys and values per token, which a `KVBuffer`
                cannot store.
        """
        for layer in self.layers:
            if layer.kind not in tuple(Reach):
                raise UnsupportedModelError(
                    f"{self.model_type} has a layer of type '{layer.kind}', which caches a state, not (only) keys and "
                    "values per token, so it cannot be edited in place. Use an attention-only model, or append updates "
                    "as text."
                )

    @classmethod
    def read(cls, model: Any) -> KVLayout:
        """Read the layout of a transformers causal language model (or of a decoder without its head).

        Raises:
            UnsupportedModelError: the model is an encoder-decoder, or does not state what its layers cache.
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
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"the configuration of {model_type} does not say what its layers cache ({error})."
            ) from error
        decoder = decoder_of(model)
        tables = frequency_tables(decoder)
        found = {key: tuple(dict.fromkeys(map(Rotary.from_table, each))) for key, each in tables.items()}
        entries = rope_entries(config)
        rules = _frequency_rules(config, rope_types(decoder), entries)
        layers = []
        for kind, arguments in types:
            reach, window = _reach(config, kind, arguments)
            own: tuple[Rotary | None, ...] = found.get(kind) or found.get("") or (None,)
            layers.append(LayerLayout(reach, window, own[0], kind))
        return cls(
            model_type,
            tuple(layers),
            _position_limit(config),
            _regime(rules, layers),
            rules,
            position_axes(decoder),
            tuple(dict.fromkeys(rotary for each in found.values() for rotary in each)) or _closed_form(config, entries),
        )


def _closed_form(config: Any, entries: list[dict[str, Any]]) -> tuple[Rotary, ...]:
    """Tables from the original RoPE formula, theta^(-2i / R), for models that store no frequency table."""
    theta = next((float(entry["rope_theta"]) for entry in entries if entry.get("rope_theta")), 1e4)
    head = getattr(config, "head_dim", None)
    if not isinstance(head, int):
        head = int(getattr(config, "hidden_size", 0)) // max(int(getattr(config, "num_attention_heads", 1)), 1)
    widths = {int(getattr(config, "rotary_dim", None) or head), head} - {0}
    return tuple(Rotary(tuple(theta ** (-2 * i / width) for i in range(width // 2))) for width in sorted(widths))


def _position_limit(config: Any) -> int | None:
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    return next((limit for limit in stated if isinstance(limit, int) and limit > 0), None)


def _frequency_rules(config: Any, kinds: set[str], entries: list[dict[str, Any]]) -> tuple[FrequencyRule, ...]:
    """A rule for each RoPE scaling whose frequencies depend on the length."""
    rules = []
    configured = _position_limit(config) or 0
    if "longrope" in kinds:
        two = [entry for entry in entries if not _one_table(entry)]
        stated = {int(e["original_max_position_embeddings"]) for e in two if e.get("original_max_position_embeddings")}
        rules += [
            FrequencyRule("longrope frequencies", within) for within in sorted(stated or ([configured] if two else []))
        ]
    if any("dynamic" in kind for kind in kinds):
        rules.append(FrequencyRule("dynamic frequencies", configured, every_length=True))
    return tuple(rules)


def _one_table(entry: dict[str, Any]) -> bool:
    """Whether the two tables of a LongRoPE are equal."""
    short, long = entry.get("short_factor"), entry.get("long_factor")
    return short is not None and long is not None and list(short) == list(long)


def _regime(rules: Sequence[FrequencyRule], layers: Sequence[LayerLayout]) -> Regime | None:
    """The tightest bound: of frequencies that change with the length, and of chunks that attention does not cross."""
    regimes = [
        Regime("chunked attention", layer.window, False)
        for layer in layers
        if layer.reach is Reach.CHUNKED and layer.window
    ]
    regimes += [Regime(rule.name, rule.within) for rule in rules]
    return min(regimes, key=lambda regime: regime.within, default=None)


def _reach(config: Any, kind: str, arguments: dict[str, Any]) -> tuple[Reach, int | None]:
    if "sliding" in kind:
        return Reach.SLIDING, int(arguments.get("sliding_window") or config.sliding_window)
    if kind == Reach.CHUNKED:
        return Reach.CHUNKED, int(config.attention_chunk_size)
    return Reach.FULL, None
