"""Benches on random weights of a published architecture, tested with tiny ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from programmable_kv.bench import edit, splice
from programmable_kv.bench.shapes import SHAPES, Shape, _settings, _tokenizer, build, load_shape, settings_of
from programmable_kv.cache.transformers_api import GROUPED_SDPA
from programmable_kv.errors import InvalidArgumentError

TINY = Shape("nobody/tiny", "llama", 4200, 32, 48, 2, 4, 2, 8, {"rope_type": "default", "rope_theta": 1e4}, tied=True)


WINDOWED = Shape(
    "nobody/windowed", "gemma3_text", 4200, 32, 48, 6, 4, 2, 8, SHAPES["gemma-3-4b"].rope, tied=True,
    more={"sliding_window": 64, "query_pre_attn_scalar": 8}, fewest_layers=6,
)  # fmt: skip


@pytest.mark.parametrize(("shape", "layers"), [(TINY, 2), (WINDOWED, 6)])
def test_the_benches_run_on_a_shape(shape: Shape, layers: int, tmp_path: Path) -> None:
    model = build("tiny", shape)
    assert model.engine.model.config._attn_implementation == GROUPED_SDPA
    for bench in (edit, splice):
        path = tmp_path / f"{bench.__name__.rpartition('.')[2]}.json"
        record = bench.run(model, path, lengths=[512], repeats=1, settings=settings_of(model))
        assert record.complete
        assert record.model == "tiny (random weights)"
        assert json.loads(path.read_text(encoding="utf-8"))["settings"]["layers"] == layers
        assert record.settings["dtype"] == "float32"
    assert record.rows[0]["ms"]["splice"] > 0


def test_only_some_layers_and_another_dtype() -> None:
    model = build("tiny", TINY, dtype="bfloat16", layers=1)
    assert len(model.engine.layout.layers) == 1
    assert model.dtype is torch.bfloat16
    assert "1 of 2 layers" in model.name
    assert model.fingerprint != build("tiny", TINY, dtype="bfloat16").fingerprint
    assert model.fingerprint == build("tiny", TINY, dtype=torch.bfloat16, layers=1).fingerprint


def test_random_weights_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = build("tiny", TINY).engine.model.get_input_embeddings().weight
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, build("tiny", TINY).engine.model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_configuration_of_its_type(name: str) -> None:
    shape = SHAPES[name]
    config = AutoConfig.for_model(shape.model_type, **_settings(shape, shape.layers, _tokenizer()))
    assert config.num_hidden_layers == shape.layers
    assert config.max_position_embeddings == 131_072
    assert shape.heads % shape.key_value_heads == 0
    assert len(_tokenizer()) < shape.vocabulary
    kinds = getattr(config, "layer_types", None)
    if kinds:
        assert set(kinds[: shape.fewest_layers]) == set(kinds)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-3-1b"])
def test_parameters_are_as_many_as_published(name: str) -> None:
    from transformers import AutoModelForCausalLM

    published = {"llama-3.2-1b": 1_235_814_400, "gemma-3-1b": 999_885_952}
    shape = SHAPES[name]
    config = AutoConfig.for_model(shape.model_type, **_settings(shape, shape.layers, _tokenizer()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == published[name]


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"llama-3\.1-8b"):
        load_shape("llama-4")
    with pytest.raises(InvalidArgumentError, match="6 to 26 layers"):
        load_shape("gemma-3-1b", layers=5)
    with pytest.raises(InvalidArgumentError, match="dtype"):
        build("tiny", TINY, dtype="int64")
    with pytest.raises(InvalidArgumentError, match="dtype"):
        build("tiny", TINY, dtype="float31")
    with pytest.raises(InvalidArgumentError, match="device"):
        build("tiny", TINY, device="nowhere")
