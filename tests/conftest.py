"""Fixtures: tiny random models of real architectures. No network; the oracle of every test is a full forward."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from programmable_kv.engine import Engine

if TYPE_CHECKING:
    from programmable_kv.bench.database_server import Database
    from serve.places import Places


def pytest_configure() -> None:
    """When tests run in parallel, each process, and each process that it starts, has one thread."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use an `embedded` fixture as needing the weights, and tests that need the weights as slow."""
    for item in items:
        if {"embedded", "embedded_plain"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.weights)
        if item.get_closest_marker("weights") is not None:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def database() -> Iterator[Database]:
    """A PostgreSQL server. Its tests are in the group `postgres`, so that only one test process starts a server."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: it is in the extra `dev`")
    from programmable_kv.bench.database_server import ABSENT, Database, programs
    from serve.processes import free_port

    if programs() is None:
        pytest.skip(ABSENT)
    found = Database(free_port())
    yield found
    found.remove()


@pytest.fixture(scope="module", params=["file", pytest.param("database", marks=pytest.mark.xdist_group("postgres"))])
def places(request: pytest.FixtureRequest) -> Iterator[Places]:
    """Where servers keep their state. A test with this fixture runs once with a file and once with a database."""
    from serve import places as kept

    kept.now = kept.Places(request.getfixturevalue("database") if request.param == "database" else None)
    yield kept.now
    kept.now = kept.Places()


TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
    },
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "gpt_neox": {},
    "minicpm3": {  # MLA: a latent is cached in the place of keys, and the rotary keys in the place of values
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
"""model type -> what its tiny configuration needs in addition to the common sizes"""

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@cache
def tiny_model(model_type: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny random model with large weights, so that attention is peaked and a wrong rotation shows."""
    torch.manual_seed(0)
    settings = {**_COMMON, **TINY.get(model_type, {}), **changes}
    if model_type in ("gemma2", "mamba"):  # only eager attention caps scores (gemma2); mamba has no attention
        attention = "eager"
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            elif "embed" in name:
                parameter.normal_(std=1.0)
    return model


def frozen(parameters: dict[str, Any]) -> Any:
    """The parameters as a hashable dictionary, so that `tiny_model` can cache by them."""

    class Frozen(dict[str, Any]):
        def __hash__(self) -> int:  # type: ignore[override]
            return hash(tuple(sorted(self.items())))

    return Frozen(parameters)


def tiny_engine(model_type: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **changes: Any) -> Engine:
    return Engine(tiny_model(model_type, attention, dtype, **changes))


@pytest.fixture(params=sorted(TINY))
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{'<turn>' + m['role'] + '\n' + m['content'] | trim + '</turn>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
_SAMPLE = (
    "the order status is pending and the account role is guest . shipped cancelled delivered returned refund deny cancel "
    "policy date tier gold silver customer asks if when then reply with the action only 2026-11-24 "
) * 4


@cache
def tokenizer(kind: str) -> Any:
    """A real tokenizer, trained here: byte-level BPE (like GPT-2's) or metaspace BPE (like Llama 2's and Gemma's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<turn>", "</turn>"]
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
            show_progress=False,
        )
    made.train_from_iterator([_SAMPLE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<turn>", "</turn>"],
        chat_template=CHATML if kind == "byte-level" else ALTERNATING,
    )


def tiny(model_type: str = "llama", kind: str = "byte-level", **changes: Any) -> Any:
    """A `Model` with a tiny random network and a real tokenizer."""
    from programmable_kv import wrap_model

    return wrap_model(tiny_model(model_type, **changes), tokenizer(kind), name=f"tiny {model_type}")


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded model with its real weights (fetched once)."""
    from programmable_kv import load_model

    return load_model()


@pytest.fixture(scope="session")
def embedded_plain() -> Any:
    """The embedded model as it was before its training for `visibility="design"`, which the lab's records are about."""
    from programmable_kv import load_model

    return load_model("embedded-plain")


def with_beginning(model: Any) -> Any:
    """The model with a tokenizer that puts its beginning-of-text token before every text."""
    tokenizer = copy.deepcopy(model.tokenizer)
    token = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )
    return replace(model, tokenizer=tokenizer)
