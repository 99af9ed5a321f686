"""What this package relies on inside transformers. A failure here names what an upgrade changed."""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, LlamaForCausalLM

from conftest import tiny_model
from programmable_kv.cache.transformers_api import Cache, CacheLayerMixin, cached_layer_types, frequency_tables


def test_positions_come_from_position_ids() -> None:
    """Positions do not come from `cache_position`, which many models no longer have and others silently ignore."""
    parameters = inspect.signature(LlamaForCausalLM.forward).parameters
    assert "position_ids" in parameters
    assert "cache_position" not in parameters
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        here = model(ids, position_ids=torch.arange(4)[None]).logits
        spread = model(ids, position_ids=torch.tensor([[0, 3, 90, 200]])).logits
    assert float((here - spread).abs().max()) > 1e-6


def test_a_four_dimensional_mask_is_taken_as_it_is() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    blind = causal.clone()
    blind[3, 1] = False
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.allclose(model(ids, attention_mask=causal[None, None]).logits, plain, atol=1e-12)
        assert not torch.allclose(model(ids, attention_mask=blind[None, None]).logits[:, 3], plain[:, 3], atol=1e-6)


def test_an_empty_index_keeps_no_logits() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        output = model(torch.tensor([[5, 6]]), logits_to_keep=torch.empty(0, dtype=torch.long))
    assert output.logits.shape[1] == 0


def test_cache_layers_have_the_interface_we_implement() -> None:
    abstract = CacheLayerMixin.__abstractmethods__
    assert abstract == {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    for name in (
        "update",
        "get_seq_length",
        "get_mask_sizes",
        "get_query_offset",
        "crop",
        "reorder_cache",
        "is_sliding",
    ):
        assert hasattr(Cache, name), name


def test_layer_types_are_read_as_transformers_reads_them() -> None:
    model = tiny_model("gemma3_text")
    types = [kind for kind, _ in cached_layer_types(model.config)]
    assert types == model.config.layer_types
    sliding = [layer.is_sliding for layer in DynamicCache(config=model.config).layers]
    assert sliding == [kind == "sliding_attention" for kind in types]


def test_frequency_tables_are_found() -> None:
    assert set(frequency_tables(tiny_model("llama").get_decoder())) == {""}
    assert set(frequency_tables(tiny_model("gemma3_text").get_decoder())) == {"full_attention", "sliding_attention"}
    assert not frequency_tables(tiny_model("gpt2", n_positions=1024, n_embd=32, n_layer=2, n_head=4).get_decoder())
