"""Models of published architectures with random weights, to time operations without a download.

Times depend on shapes, dtype and device, not on the values of weights or on the text. The benches take only times from
these models. This module trains their tokenizer on the benches' own text. Every model gets 131,072 positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from programmable_kv.cache.transformers_api import GROUPED_SDPA, register_attention
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.models.load import Model

POSITIONS = 131_072
_SEED = 0
_VOCABULARY = 4096
"""Entries of the benches' tokenizer: fewer than any shape has."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture with the numbers from its publisher's config.json."""

    source: str
    """The model whose config.json gives the numbers."""
    model_type: str
    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    rope: Mapping[str, Any]
    tied: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)
    fewest_layers: int = 1
    """The smallest number of layers that includes every kind of layer."""


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def _plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_GEMMA3_4B_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": _plain(1e4),
}
_GEMMA3_1B_ROPE = {"full_attention": _plain(1e6), "sliding_attention": _plain(1e4)}

SHAPES: dict[str, Shape] = {
    "smollm2-135m": Shape(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 49152, 576, 1536, 30, 9, 3, 64, _plain(1e5), tied=True
    ),
    "llama-3.2-1b": Shape("meta-llama/Llama-3.2-1B", "llama", 128256, 2048, 8192, 16, 32, 8, 64, _llama3(32.0), tied=True),
    "llama-3.2-3b": Shape("meta-llama/Llama-3.2-3B", "llama", 128256, 3072, 8192, 28, 24, 8, 128, _llama3(32.0), tied=True),
    "llama-3.1-8b": Shape("meta-llama/Llama-3.1-8B", "llama", 128256, 4096, 14336, 32, 32, 8, 128, _llama3(8.0)),
    "llama-3.1-70b": Shape("meta-llama/Llama-3.1-70B", "llama", 128256, 8192, 28672, 80, 64, 8, 128, _llama3(8.0)),
    "mistral-7b": Shape(
        "mistralai/Mistral-7B-v0.3", "mistral", 32768, 4096, 14336, 32, 32, 8, 128, _plain(1e6), more={"sliding_window": None}
    ),
    "qwen2.5-7b": Shape("Qwen/Qwen2.5-7B", "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, _plain(1e6)),
    "qwen3-8b": Shape("Qwen/Qwen3-8B", "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, _plain(1e6)),
    "gemma-3-1b": Shape(
        "google/gemma-3-1b-it", "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, _GEMMA3_1B_ROPE, tied=True,
        more={"sliding_window": 512, "query_pre_attn_scalar": 256}, fewest_layers=6,
    ),
    "gemma-3-4b": Shape(
        "google/gemma-3-4b-it", "gemma3_text", 262208, 2560, 10240, 34, 8, 4, 256, _GEMMA3_4B_ROPE, tied=True,
        more={"sliding_window": 1024, "query_pre_attn_scalar": 256}, fewest_layers=6,
    ),
}  # fmt: skip
"""Shapes by name, for `pkv bench edit --shape NAME`."""


def load_shape(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    layers: int | None = None,
) -> Model:
    """Build a model of a named shape with random weights.

    Args:
        name: one of `SHAPES`.
        device: the model's device; torch's default if None.
        dtype: the dtype of weights and cache; a torch dtype or its name.
        layers: build only this many layers (times are about proportional); all if None.

    Raises:
        InvalidArgumentError: the shape, dtype or device is unknown, or the number of layers is more than the shape's or
            leaves out a kind of layer.
    """
    if name not in SHAPES:
        raise InvalidArgumentError(f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    return build(name, SHAPES[name], device=device, dtype=dtype, layers=layers)


def build(
    name: str,
    shape: Shape,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    layers: int | None = None,
) -> Model:
    """Build a model of any shape with random weights. Arguments and errors: see `load_shape`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    count = shape.layers if layers is None else layers
    if not shape.fewest_layers <= count <= shape.layers:
        raise InvalidArgumentError(
            f"{name} can be built with {shape.fewest_layers} to {shape.layers} layers, not with {count}."
        )
    precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise InvalidArgumentError(
            f"{dtype!r} is not a floating-point dtype of torch: use float32, bfloat16 or float16."
        )
    try:
        where = torch.get_default_device() if device is None else torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    tokenizer = _tokenizer()
    config = AutoConfig.for_model(shape.model_type, **_settings(shape, count, tokenizer))
    register_attention()
    devices = [] if where.type == "cpu" else [where]
    with torch.random.fork_rng(devices, device_type=where.type), where:
        torch.manual_seed(_SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=precision, attn_implementation="sdpa").eval()
    model.set_attn_implementation(GROUPED_SDPA)
    digest = hashlib.sha256(json.dumps([config.to_dict(), str(precision), _SEED], sort_keys=True, default=str).encode())
    cut = "" if count == shape.layers else f", {count} of {shape.layers} layers"
    return Model(f"{name} (random weights{cut})", tokenizer, Engine(model), f"shape-{digest.hexdigest()[:26]}")


def settings_of(model: Model) -> dict[str, Any]:
    """The settings that a record of a shape's times must also have: `run(..., settings=settings_of(model))`."""
    device = model.engine.device
    found = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(model.engine.layout.layers),
        "device": device.type,
    }
    module = torch.get_device_module(device) if device.type != "cpu" else None
    name = getattr(module, "get_device_name", None)
    if name is not None:
        found["device_name"] = name(device)
    return found


def _settings(shape: Shape, layers: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": json.loads(json.dumps(dict(shape.rope))),
        "tie_word_embeddings": shape.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        **shape.more,
    }


_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def _tokenizer() -> Any:
    """Byte-level BPE trained on the benches' own text, so that a word is about one token, as with a real tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from programmable_kv.bench.edit import FILLER
    from programmable_kv.bench.splice import PREFIX, QUESTION, SENTENCE
    from programmable_kv.demo.demo import CASES, VALUES, policy

    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cases = [text for case in CASES for text in (case.value, case.request, case.before, case.after)]
    made.train_from_iterator([policy(), FILLER, PREFIX, QUESTION, SENTENCE, *VALUES.values(), *cases], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_CHAT,
    )
