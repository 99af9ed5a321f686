"""Representative architectures through the zoo's check, and the page that is written from its record."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from programmable_kv.cache.rotation import rotate
from programmable_kv.errors import InvalidOptionsError
from programmable_kv.lab import zoo, zoo_page
from programmable_kv.lab.tiny_configs import EXCEPTIONS, tiny_config
from programmable_kv.lab.zoo import NOT_BUILT, Variant, all_variants, examine, examine_apart, summary, variants_named
from programmable_kv.records import read_record
from programmable_kv.verify.alone import prefill_alone
from programmable_kv.verify.relocation import Verdict, rule_of

ROOT = Path(__file__).parent.parent.parent
EXACT, WITHIN, ATTENTION_ONLY, REFUSED = map(str, Verdict)

# The verdict is asserted; the comment says what the row represents. The code knows none of this.
REPRESENTATIVES = {
    "llama": (EXACT, "128 channels, half-split"),
    "glm": (EXACT, "64 channels, interleaved"),  # partial
    "gptj": (EXACT, "64 channels, interleaved"),  # no table of frequencies in the model
    "gpt_neox": (EXACT, "24 channels, half-split"),  # partial
    "stablelm": (EXACT, "half-split"),
    "phi3": (EXACT, "96 channels, half-split"),
    "gemma3_text": (EXACT, "2 frequency tables"),
    "modernbert-decoder": (EXACT, "2 frequency tables"),
    "smollm3": (EXACT, "1 of 4 layers do not rotate"),
    "nanochat": (EXACT, "half-split"),  # turns the other way round
    "mixtral": (EXACT, "half-split"),  # mixture of experts
    "gpt_oss": (EXACT, "yarn scaling"),  # attention factor, sinks
    "apertus": (EXACT, "llama3 scaling"),
    "deepseek_v2": (EXACT, "beside a latent, 64 channels, interleaved"),
    "deepseek_v3": (EXACT, "beside a latent, 64 channels, half-split"),
    "deepseek_v32": (EXACT, "indexer_keys"),  # sparse attention with an indexer
    "bloom": (EXACT, "order is told"),  # ALiBi
    "llama4_text": (WITHIN, "1 of 4 layers do not rotate"),
    "qwen3_next": (ATTENTION_ONLY, "64 channels, half-split"),
    "jamba": (ATTENTION_ONLY, "order is told"),
    "gpt2": (REFUSED, "in the hidden states"),
    "opt": (REFUSED, "in the hidden states"),
    "bart": (REFUSED, "in the hidden states"),  # ignores the positions it is given
    "mamba": (REFUSED, "nothing that turns"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REPRESENTATIVES))
def test_a_representative_gets_its_verdict(name: str) -> None:
    verdict, family = REPRESENTATIVES[name]
    row = examine(Variant(name))
    assert row["verdict"] == verdict, row
    assert family in row["family"], row
    assert row["reason"] or verdict == EXACT


@pytest.mark.parametrize(
    ("name", "sections"), [("qwen2_5_vl", "3 axes in sections"), ("qwen3_vl", "3 axes in interleaved sections")]
)
def test_an_image_moves_along_the_axes_that_moved(name: str, sections: str) -> None:
    """A cached image, spliced where each axis moved by its own offset, equals the image computed there."""
    whole = AutoModelForImageTextToText.from_config(tiny_config(name))

    def placed(text: int) -> torch.Tensor:
        """Where the model itself puts the 12 tokens of an image that follows some text, [3, 12]."""
        kinds = torch.tensor([[0] * text + [1] * 12])
        size = torch.tensor([[1, 6, 8]])
        positions, _ = whole.model.get_rope_index(torch.full((1, text + 12), 7), kinds, image_grid_thw=size)
        return positions[:, 0, text:]

    assert bool((placed(10) - placed(3) == 7).all()), "an image moves along every axis, not only along time"
    variant = Variant(name, "text side")
    assert sections in examine(variant)["family"]
    model = zoo.build(variant)
    layout = zoo.prove(model).layout
    ids = list(range(7, 19))
    by = torch.tensor([300, 17, 5])[:, None].expand(3, 12)
    here, there = prefill_alone(model, ids, placed(3)), prefill_alone(model, ids, placed(3) + by)
    along_time_only = by * torch.tensor([1, 0, 0])[:, None]
    for index, layer in enumerate(layout.layers):
        rule = rule_of(layer, "keys")
        assert rule is not None
        moved = rotate(here[index]["keys"], by, rule)
        torch.testing.assert_close(moved, there[index]["keys"], rtol=0, atol=1e-3)
        torch.testing.assert_close(here[index]["values"], there[index]["values"], rtol=0, atol=1e-3)
        wrong = rotate(here[index]["keys"], along_time_only, rule)
        assert float((wrong - there[index]["keys"]).abs().max()) > 0.1, "the other axes must be seen to matter"


def test_every_type_of_transformers_has_a_row() -> None:
    rows = read_record(ROOT / "results" / "zoo.json").rows
    assert [(row["type"], row["side"]) for row in rows] == [(each.name, each.side) for each in all_variants()]


def test_the_record_leaves_nothing_unexplained() -> None:
    record = read_record(ROOT / "results" / "zoo.json")
    assert all(row["reason"] or row["verdict"] == EXACT for row in record.rows)
    assert all(row["worst"] <= 1 for row in record.rows if row["verdict"] in (EXACT, WITHIN, ATTENTION_ONLY))
    assert Counter(row["verdict"] for row in record.rows if row["side"] == "causal LM")[EXACT] >= 105
    assert record.summary == summary(record.rows)


def test_the_page_is_what_the_record_says() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page == zoo_page.page(read_record(ROOT / "results" / "zoo.json")), "run `pkv zoo`"


def test_a_type_that_cannot_be_built_costs_its_row_only() -> None:
    row = examine(Variant("no such type"))
    assert row["verdict"] == NOT_BUILT
    assert "building it failed: KeyError" in row["reason"]


@pytest.mark.slow
def test_a_type_that_hangs_is_ended() -> None:
    row = examine_apart(Variant("llama"), timeout_seconds=0.01)
    assert row["verdict"] == NOT_BUILT
    assert "did not finish" in row["reason"]


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(InvalidOptionsError, match="lama"):
        variants_named(["lama"])


def test_every_exception_has_its_reason() -> None:
    for special in EXCEPTIONS.values():
        assert special.why
        assert special.defaults or special.settings


def test_a_tiny_configuration_keeps_what_makes_the_architecture() -> None:
    config = tiny_config("gemma3_text")
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.head_dim == 256
    assert config.num_hidden_layers == len(config.layer_types) == 2
    assert config.vocab_size == 256
