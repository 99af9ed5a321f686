"""A tiny configuration of any architecture that transformers ships, derived from its own default configuration.

The rules keep what defines an architecture: head sizes, rotary settings, kinds of layers, attention windows. They
reduce what only makes it large: depth, number of heads, experts, vocabulary, feed-forward widths. One set of rules
serves every type; a type that needs more is a row of `EXCEPTIONS` with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

HEADS = 4
VOCABULARY = 256
ORDINARY_TOKENS = 240
"""Ids below this are not special tokens in any tiny configuration."""
_SHALLOWEST = 2

_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab(_size)?(_base|_per_layer_input)?|codebook_size", VOCABULARY),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size).*|dff|dim_ff|feed_forward_size", 48),
    (r"(moe_)?num_experts|n_routed_experts|num_local_experts", 4),
    (r"(moe_)?num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r"n_group|num_expert_group|topk_group", 1),
    (r"(moe_)?num_shared_experts|n_shared_experts|zero_expert_num", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"router_hidden_size|adapter_rank|time_step_rank|mamba_dt_rank", 16),
    (r"split_ngram_parts|make_ngram_vocab_size_divisible_by", 4),
)
"""(pattern, value): the first pattern that matches an attribute's whole name caps the attribute at this value."""

_DEPTHS = r"(num_|n_)?(hidden_|encoder_|decoder_|num_encoder_|num_decoder_)?(layers?|blocks)|num_layers_per_stack|depth"
_HEAD_COUNTS = (
    r"((n|num|encoder|decoder)_)?((num_)?(encoder|decoder)_)?(attention_)?heads?|n_heads?|swa_num_attention_heads"
)
_KEY_VALUE_HEADS = r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups"
_WIDTHS = (
    r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embed_dim|embedding_size|hidden_size_global|word_embed_proj_dim"
)
_PROPORTIONAL = r"attention_hidden_size|lru_width|mamba_d_ssm|mamba_n_heads|mamba_num_heads|n_mamba_heads|d_inner"
_OFFSETS = r".*_layer_offset"
_INTERVALS = r".*(_period|_interval|_every_n_layers|_pattern|_group_size)"


@dataclass(frozen=True, slots=True)
class Special:
    """What a type needs beyond the rules, and why."""

    why: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings that its default configuration lacks, added before the rules are applied."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the rules get wrong."""


_NO_EXPERTS = "its default configuration does not say how many experts there are"
_ALPHA = "its default configuration lacks the alpha that its frequencies are computed from"
_ALPHA_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}
_HYBRID = ("linear_attention", "full_attention")

EXCEPTIONS: dict[str, Special] = {
    "bamba": Special("by default no layer attends", {"attn_layer_indices": [1]}),
    "cohere_compass_text": Special(
        "its default configuration states no rotary settings",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "dbrx": Special(
        "its attention needs a theta and a bound on queries and keys that its default lacks",
        settings={"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    ),
    "deepseek_v2": Special(_NO_EXPERTS, {"num_experts_per_tok": 2}),
    "dots1": Special(_NO_EXPERTS, {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}),
    "gemma3n_text": Special(
        "half of its layers must share the keys and values of the same kinds of layers before them",
        settings={
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.95, 0.0] * 2,
        },
    ),
    "granitemoehybrid": Special("by default no layer attends", settings={"layer_types": list(_HYBRID)}),
    "hrm_text": Special("its depth is what its cycles make of one stack", settings={"num_hidden_layers": 16}),
    "ernie4_5_vl_moe_text": Special(
        "its height and width sections come first and must be equal",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [22, 22, 20]}},
    ),
    "hunyuan_v1_dense": Special(_ALPHA, {"rope_parameters": _ALPHA_ROPE, "head_dim": 128}),
    "hunyuan_v1_moe": Special(_ALPHA, {"rope_parameters": _ALPHA_ROPE, "head_dim": 128}),
    "hunyuan_vl_text": Special(
        _ALPHA, {"rope_parameters": {**_ALPHA_ROPE, "mrope_section": [16, 16, 16, 16]}, "head_dim": 128}
    ),
    "lfm2_moe": Special("its default states no layer types", {"layer_types": ["conv", "full_attention"] * 16}),
    "mamba2": Special("its groups must divide its heads", settings={"n_groups": 2}),
    "ministral": Special("its default has no head size", {"head_dim": 128}),
    "musicgen_decoder": Special("with one codebook it takes one row of ids, as others do", settings={"num_codebooks": 1}),
    "musicgen_melody_decoder": Special("as musicgen", settings={"num_codebooks": 1}),
    "nemotron": Special("its default has no number of key-value heads", {"num_key_value_heads": 8}),
    "qwen4_exp_text": Special("its default has no indexer", {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64, "indexer_compress_ratio": 4,
    }),
    "recurrent_gemma": Special("its pattern of blocks is three long", settings={"num_hidden_layers": 3}),
    "reformer": Special("its axial widths must sum to its width", settings={"axial_pos_embds_dim": (16, 64)}),
    "zamba": Special(
        "it ties the shared attention of two hybrid layers at least",
        settings={"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    ),
    "xmod": Special("it must be told a language", {"default_language": "en_XX"}),
}  # fmt: skip


NOTES = {
    "gemma3n": "Its vision tower needs a library that is not installed here; its text side is `gemma3n_text`.",
    "gemma4_assistant": "A draft model: its layers read the cache of the model that it drafts for.",
    "gemma4_unified_assistant": "A draft model: its layers read the cache of the model that it drafts for.",
    "minimax": "Its own cache class keeps the states of its linear layers apart from the layers.",
    "deepseek_v4": "It pools windows of tokens that are aligned to positions.",
    "recurrent_gemma": "Its recurrence restarts at position 0, so a token there is unlike one anywhere else.",
    "roformer": "It is rotary, but counts its positions by itself.",
}
"""type -> a note that explains its row to a reader. The verdict and its reason are measured regardless."""

_SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "linear"): {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ("llama", "yarn"): {"rope_type": "yarn", **_SCALED},
    ("llama", "llama3"): {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED},
    ("llama", "dynamic"): {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ("llama", "longrope"): {
        "rope_type": "longrope", **_SCALED, "short_factor": [1.0 + i / 64 for i in range(64)],
        "long_factor": [2.0 + i / 8 for i in range(64)],
    },
}  # fmt: skip
"""(type, scaling) -> rotary settings: the scalings that no type has by default, on one type that supports them all"""


def tiny_config(
    model_type: str, kind: type[PreTrainedConfig] | None = None, rope_parameters: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """The tiny configuration of a type, or of the part of it that has another configuration class (its text side).

    Raises whatever the type's own configuration class raises.
    """
    special = EXCEPTIONS.get(model_type, Special(""))
    if kind is None or kind is CONFIG_MAPPING[model_type]:
        kind = CONFIG_MAPPING[model_type]
    else:
        special = EXCEPTIONS.get(str(kind.model_type), special)
    settings = {**shrunk(kind(**special.defaults)), **special.settings}
    if rope_parameters is not None:
        settings["rope_parameters"] = dict(rope_parameters)
    return kind(**{**special.defaults, **settings})


def text_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The class of an image-text type's text configuration."""
    return type(CONFIG_MAPPING[model_type]().get_text_config(decoder=True))


def tiny_text_config(model_type: str) -> PreTrainedConfig:
    """The tiny text configuration of an image-text type with M-RoPE. Adds sections where the default states none."""
    kind = text_config_class(model_type)
    config = tiny_config(model_type, kind)
    rope = dict(config.rope_parameters)
    if "mrope_section" in str(rope) or "rope_type" not in rope:
        return config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = (int(head * rope.get("partial_rotary_factor", 1.0)) + 1) // 2
    side = pairs * 5 // 16
    return tiny_config(model_type, kind, {**rope, "mrope_section": [pairs - 2 * side, side, side]})


def has_sections(kind: type[PreTrainedConfig]) -> bool:
    """Whether a configuration's rotary settings may have M-RoPE sections."""
    return "mrope_section" in (getattr(kind, "ignore_keys_at_rope_validation", None) or ())


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The attributes of a configuration that the rules change, with their tiny values, sub-configurations included."""
    attributes = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    width = _Width.of(attributes)
    layers = _Layers.of(attributes)
    changes: dict[str, Any] = {}
    tokens = 0
    for name, value in attributes.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = {"model_type": value.model_type, **shrunk(value)}
        elif re.fullmatch(r"\w+_token_(id|index)", name) and isinstance(value, int):
            changes[name] = ORDINARY_TOKENS + tokens % (VOCABULARY - ORDINARY_TOKENS)
            tokens += 1
        elif isinstance(value, list | tuple):
            changes[name] = layers.cut(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            changes[name] = _smaller(name, value, width, layers)
    return {name: value for name, value in changes.items() if value != attributes[name]}


def _smaller(name: str, value: int, width: _Width, layers: _Layers) -> int:
    if re.fullmatch(_DEPTHS, name):
        return min(value, len(layers.kept))
    if re.fullmatch(_HEAD_COUNTS, name):
        return min(value, HEADS)
    if re.fullmatch(_KEY_VALUE_HEADS, name):
        return min(value, HEADS if value >= width.heads else HEADS // 2)
    if re.fullmatch(_WIDTHS, name) and value == width.old:
        return width.new
    if re.fullmatch(_PROPORTIONAL, name):
        return max(value * width.new // width.old, 1)
    if re.fullmatch(_INTERVALS, name):
        return min(value, 2)
    if re.fullmatch(_OFFSETS, name):
        return min(value, 1)
    found = (size for pattern, size in _SIZES if re.fullmatch(pattern, name))
    return min(value, next(found, value))


@dataclass(frozen=True, slots=True)
class _Width:
    """The model's width before and after shrinking: fewer heads, each with as many channels as before."""

    old: int
    new: int
    heads: int

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> _Width:
        width, heads = _first(attributes, _WIDTHS) or 1, _first(attributes, _HEAD_COUNTS)
        if heads is None:
            return cls(width, min(width, 64), HEADS)
        return cls(width, max(width * min(heads, HEADS) // heads // 8 * 8, 8), heads)


@dataclass(frozen=True, slots=True)
class _Layers:
    """The default layers that are kept: the first of every kind that the per-layer lists distinguish."""

    depth: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> _Layers:
        depth = _first(attributes, _DEPTHS) or _SHALLOWEST
        lists = [v for v in attributes.values() if isinstance(v, list | tuple) and len(v) == depth]
        kinds: dict[str, int] = {}
        for index in range(depth):
            kinds.setdefault(str([entries[index] for entries in lists if not _are_indices(entries, depth)]), index)
        patterned = any(re.fullmatch(_INTERVALS, n) and isinstance(v, int) and v > 1 for n, v in attributes.items())
        wanted = min(depth, max(len(kinds), 2 * _SHALLOWEST if patterned else _SHALLOWEST))
        others = [index for index in range(depth) if index not in kinds.values()]
        return cls(depth, tuple(sorted([*kinds.values(), *others][: max(wanted, 1)])))

    def cut(self, value: Sequence[Any]) -> Sequence[Any]:
        """Cut a per-layer list, or a list of layer numbers, to the layers that are kept. Other lists are unchanged."""
        if _are_indices(value, self.depth):
            return [self.kept.index(entry) for entry in value if entry in self.kept]
        if len(value) == self.depth:
            return [value[index] for index in self.kept]
        return value


def _are_indices(value: Sequence[Any], depth: int) -> bool:
    whole = bool(value) and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    return whole and all(a < b for a, b in pairwise(value)) and 0 <= value[-1] < depth


def _first(attributes: Mapping[str, Any], pattern: str) -> int | None:
    found = (v for n, v in attributes.items() if re.fullmatch(pattern, n) and isinstance(v, int) and v > 0)
    return next(found, None)
