"""The ways of computing on a CPU and on a GPU give the losses and gradients of the plain way."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from conftest import tiny_model, tokenizer
from programmable_kv.errors import TrainingError
from programmable_kv.models.fetch import adapter_folder
from training.design import model as adapters
from training.design.attention import NAME, attention, register
from training.design.batches import Batch, batches, divergence, predicted
from training.design.blocks import training_rule_sets, write
from training.design.merged import MergedLinear
from training.design.parts import Encoding
from training.design.whole import WholeLinear, whole_layers
from training.masters import Masters


def adapted(way: str) -> Any:
    """A tiny model in float64 whose adapter changes every layer, with the same weights in every way."""
    model = copy.deepcopy(tiny_model("llama", dtype=torch.float64))  # that one is shared by all tests
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    if way != "plain":
        config._register_custom_module({torch.nn.Linear: MergedLinear if way == "cpu" else WholeLinear})
    if way == "cpu":
        model.set_attn_implementation(register())
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(3)
    for weight in adapters.trained(model):
        weight.data.normal_(std=0.2, generator=generator)
    for layer in whole_layers(model):
        layer.merge_whole()
    return model


def batch() -> Batch:
    """Two sequences under design masks, longer than a block of the attention."""
    encoding = Encoding(tokenizer("byte-level"))
    rng = random.Random(5)
    drawn = [write(training_rule_sets(rng), encoding, "rule sets alone", alone=True) for _ in range(2)]
    (together,) = batches(drawn, 1_000_000)
    assert together.ids.shape[1] > 128
    return together


def test_losses_and_gradients_are_those_of_the_plain_way() -> None:
    """Under masks and on plain text, and again after the weights were changed in place."""
    together, found = batch(), []
    text = together.ids[:, :80]
    for way in ("plain", "cpu", "gpu"):
        model = adapted(way)
        assert any(isinstance(module, MergedLinear) for module in model.modules()) == (way == "cpu")
        assert bool(whole_layers(model)) == (way == "gpu")
        assert (model.config._attn_implementation == NAME) == (way == "cpu")
        values: list[torch.Tensor] = []
        masters = Masters(adapters.trained(model))
        for _ in range(2):
            said, distance = predicted(model, together).loss, divergence(model, text)
            (said.mean() + distance).backward()  # type: ignore[no-untyped-call]
            for layer in whole_layers(model):
                layer.fold_gradient()
            gradients = [weight.grad for weight in adapters.trained(model)]
            assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
            values += [
                said.detach(),
                distance.detach(),
                *(gradient.clone() for gradient in gradients if gradient is not None),
            ]
            assert masters.step(1e-2, 1.0)
            for layer in whole_layers(model):
                layer.merge_whole()
        found.append(values)
    plain, *others = found
    assert not torch.allclose(plain[0], plain[len(plain) // 2], rtol=1e-3)  # the step changed something
    for ours in others:
        for one, other in zip(plain, ours, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("tokens", [1, 40, 128, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(heads: tuple[int, int], tokens: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    made = [
        torch.randn(2, tokens, count, 8, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for count in (heads[0], heads[1], heads[1], heads[0])
    ]
    query, key, value, given = made
    mask = (torch.rand(2, 1, tokens, tokens, generator=generator) < 0.5).tril() | torch.eye(tokens, dtype=torch.bool)
    plain = scaled_dot_product_attention(
        query, key, value, attn_mask=mask if masked else None, is_causal=not masked, scale=0.3, enable_gqa=True
    )
    ours = attention(query, key, value, mask if masked else None, 0.3)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        torch.autograd.grad(plain, (query, key, value), given.detach()),
        torch.autograd.grad(ours, (query, key, value), given.detach()),
        strict=True,
    ):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)  # parts are summed in float32


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_without_the_adapter_it_is_the_base(way: str) -> None:
    model, together = adapted(way), batch()
    rows = torch.from_numpy(together.ids[:, :20]).long()
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=rows).logits
    torch.testing.assert_close(off, tiny_model("llama", dtype=torch.float64)(input_ids=rows).logits)


def test_only_the_adapter_is_written(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / adapters.CONFIG).write_text("{}")
    model = adapted("gpu")
    adapters.write(model, tmp_path / "start", tmp_path)
    written = load_file(tmp_path / adapters.WEIGHTS)
    assert len(written) == len(adapters.trained(model)) == 2 * len(whole_layers(model))
    assert all("lora_" in name for name in written)


def test_a_run_keeps_the_summaries_of_earlier_ones(tmp_path: Path) -> None:
    assert adapters.earlier_runs(tmp_path) == []
    assert adapters.earlier_runs(adapter_folder("embedded-plain")) == []  # another kind of training
    first, second = adapters.earlier_runs(adapter_folder("embedded"))
    assert first["step"] != second["step"]
    assert first["held_out"]["after"]["answers"].keys() == second["held_out"]["before"]["answers"].keys()
    assert "curve" not in second


@pytest.mark.parametrize("text", ["", "{", "3"])
def test_a_damaged_summary_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / adapters.SUMMARY).write_text(text)
    with pytest.raises(TrainingError, match="restore or delete"):
        adapters.earlier_runs(tmp_path)


def test_a_cpu_loads_it_lean(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer("byte-level").save_pretrained(tmp_path / "base")
    start = adapters.new_adapter(tmp_path / "base", 4, tmp_path / "start", seed=1)
    model, _ = adapters.load(tmp_path / "base", start, torch.device("cpu"))
    assert model.config._attn_implementation == NAME
    assert sum(isinstance(module, MergedLinear) for module in model.modules()) == len(adapters.trained(model)) // 2
