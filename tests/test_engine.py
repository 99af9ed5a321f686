"""The engine and the buffer against transformers' own forward, in float64, on every tiny architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from conftest import TINY, frozen, tiny_engine, tiny_model
from programmable_kv.cache.layout import KVLayout, LayerLayout, Reach
from programmable_kv.cache.rotation import Pairing, Rotary
from programmable_kv.cache.transformers_api import GROUPED_SDPA, register_attention
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import (
    CacheBufferError,
    ContextOverflowError,
    InvalidArgumentError,
    NonFiniteLogitsError,
    UnsupportedModelError,
    UnverifiedError,
)
from programmable_kv.verify.relocation import prove_relocation
from reference import assert_rows_equal, full_forward, largest_difference

IDS = [int(i) for i in torch.randint(3, 500, (40,), generator=torch.Generator().manual_seed(3))]
# transformers' eager attention computes its softmax in float32, whatever the model's dtype is.
EXACT = {"gemma2": 2e-4}


def atol(model_type: str) -> float:
    return EXACT.get(model_type, 1e-10)


def test_prefill_and_appends_equal_one_full_forward(model_type: str) -> None:
    engine = tiny_engine(model_type)
    expected, logits = full_forward(engine.model, IDS)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:23], logits=0)
    engine.append(buffer, IDS[23:24], logits=0)
    last = engine.append(buffer, IDS[24:], logits=2)
    assert_rows_equal(buffer, expected, range(40), atol=atol(model_type))
    torch.testing.assert_close(last, logits[-2:], rtol=0, atol=10 * atol(model_type))
    assert engine.meter.tokens_computed == 40


def test_recomputing_any_rows_of_an_exact_cache_changes_nothing(model_type: str) -> None:
    engine = tiny_engine(model_type)
    expected, logits = full_forward(engine.model, IDS)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS, logits=0)
    for slots in ([5, 6, 7], [0], [2, 9, 10, 31], [38, 39], list(range(40))):
        rows = Rows(tuple(IDS[s] for s in slots), tuple(slots), tuple(slots))
        output = engine.compute(buffer, rows)
        assert_rows_equal(buffer, expected, range(40), atol=atol(model_type))
        torch.testing.assert_close(output[0], logits[slots[-1]], rtol=0, atol=10 * atol(model_type))


def test_rows_are_proved(model_type: str) -> None:
    assert tiny_engine(model_type).rows.exact


@pytest.mark.parametrize(("model_type", "reason"), [("gpt_neo", "differ"), ("bloom", "mask")])
def test_models_that_build_their_own_mask_are_refused(model_type: str, reason: str) -> None:
    """GPT-Neo's local attention counts slots, and BLOOM takes no mask for rows, so these models can only append."""
    settings: dict[str, dict[str, Any]] = {
        "gpt_neo": {"attention_types": ((("global", "local"), 1),), "window_size": 8, "num_layers": 2, "num_heads": 4},
        "bloom": {"n_layer": 2, "n_head": 4},
    }
    engine = tiny_engine(model_type, "eager", **settings[model_type])
    assert not engine.rows.exact
    with pytest.raises(UnverifiedError, match=reason):
        engine.require_rows()
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:20], logits=0)
    logits = engine.append(buffer, IDS[20:])
    expected, all_logits = full_forward(engine.model, IDS)
    assert_rows_equal(buffer, expected, range(40), atol=1e-6)
    torch.testing.assert_close(logits[0], all_logits[-1], rtol=0, atol=1e-5)


def test_a_window_that_is_not_the_models_is_caught() -> None:
    engine = Engine(tiny_model("mistral"))
    layers = tuple(replace(layer, window=30) for layer in engine.layout.layers)
    engine.layout = replace(engine.layout, layers=layers)
    assert not engine.rows.exact


def test_rows_in_the_middle_and_at_the_end_in_one_forward(model_type: str) -> None:
    """The appended rows of a forward read a field that the same forward refreshes, in every layer."""
    engine = tiny_engine(model_type)
    changed = list(IDS)
    changed[4:6] = [77, 78]
    expected, _ = full_forward(engine.model, changed)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:30], logits=0)
    slots = tuple(range(4, 40))
    engine.compute(buffer, Rows(tuple(changed[4:]), slots, slots))
    assert_rows_equal(buffer, expected, range(40), atol=atol(model_type))


def test_sequential_and_fused_rows_agree(model_type: str) -> None:
    engine = tiny_engine(model_type)
    together, apart = engine.new_buffer(), engine.new_buffer()
    for buffer in (together, apart):
        engine.append(buffer, IDS[:30], logits=0)
    field, appended = Rows((77, 78), (4, 5), (4, 5)), Rows.appended(IDS[30:], 30, 30)
    fused = engine.compute(together, field.followed_by(appended))
    engine.compute(apart, field, logits=0)
    stepwise = engine.compute(apart, appended)
    torch.testing.assert_close(fused, stepwise, rtol=0, atol=10 * atol(model_type))
    for index in range(len(together)):
        torch.testing.assert_close(together.keys(index), apart.keys(index), rtol=0, atol=atol(model_type))


def test_a_stale_note_survives_refreshing_the_field_alone(model_type: str) -> None:
    """Negative check: after an in-place refresh, later rows must NOT equal a full prefill of the new text."""
    engine = tiny_engine(model_type)
    changed = list(IDS)
    changed[4:6] = [77, 78]
    expected, _ = full_forward(engine.model, changed)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS, logits=0)
    engine.compute(buffer, Rows((77, 78), (4, 5), (4, 5)), logits=0)
    assert_rows_equal(buffer, expected, range(6), atol=atol(model_type))
    assert largest_difference(buffer, expected, range(6, 12)) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager", GROUPED_SDPA])
def test_generate_through_the_buffer_equals_transformers_own(model_type: str, attention: str) -> None:
    register_attention()
    if model_type == "gemma2" and attention != "eager":
        pytest.skip("transformers implements this model's soft-capped scores in eager attention only")
    model = tiny_model(model_type, attention, torch.float32)
    engine = Engine(model)
    prompt = torch.tensor([IDS])
    arguments: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **arguments)
    assert model.generate(prompt, past_key_values=engine.new_buffer(), **arguments).tolist() == expected.tolist()
    warm = engine.new_buffer()
    engine.append(warm, IDS[:-1], logits=0)
    assert model.generate(prompt, past_key_values=warm, **arguments).tolist() == expected.tolist()
    own = engine.new_buffer()
    logits = engine.append(own, IDS)
    stream = engine.stream(own, logits, frozenset())
    assert [next(stream) for _ in range(24)] == expected[0, 40:].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_grouped_attention_equals(model_type: str, attention: str) -> None:
    if model_type == "gemma2":
        pytest.skip("eager only")
    register_attention()
    outputs = []
    for implementation in (attention, GROUPED_SDPA):
        engine = Engine(tiny_model(model_type, implementation))
        buffer = engine.new_buffer()
        engine.append(buffer, IDS[:30], logits=0)
        outputs.append(engine.append(buffer, IDS[30:], logits=10))
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-4 if attention == "eager" else 1e-10)


def test_a_hole_in_positions_is_respected(model_type: str) -> None:
    """Rows after a hole must use positions, not indices: windows and rotations count the missing tokens."""
    engine = tiny_engine(model_type)
    positions = [*range(10), *range(15, 30)]
    ids = IDS[:25]
    with torch.no_grad():
        from programmable_kv.cache.masks import attention_masks

        where = torch.tensor(positions)
        additive = torch.float64 if engine.model.config._attn_implementation == "eager" else None
        mask = attention_masks(engine.layout, where, where, additive=additive)
        expected = engine.model(
            input_ids=torch.tensor([ids]), position_ids=where[None], attention_mask=mask, use_cache=False
        ).logits[0, -1]
    buffer = engine.new_buffer()
    engine.compute(buffer, Rows(tuple(ids[:10]), tuple(range(10)), tuple(positions[:10])), logits=0)
    engine.compute(buffer, Rows(tuple(ids[10:18]), tuple(range(10, 18)), tuple(positions[10:18])), logits=0)
    output = engine.append(buffer, ids[18:])
    torch.testing.assert_close(output[0], expected, rtol=0, atol=10 * atol(model_type))


def test_relocation_is_proved(model_type: str) -> None:
    proof = tiny_engine(model_type).relocation
    assert proof.exact, proof.reason


@pytest.mark.parametrize("fault", ["theta", "scaling"])
def test_a_wrong_layout_is_caught(fault: str) -> None:
    engine = tiny_engine("llama")
    rotary = engine.layout.layers[1].rotary
    assert rotary is not None
    wrong = Rotary(tuple(f * 1.01 if fault == "theta" else f / 2 for f in rotary.frequencies))
    proof = prove_relocation(
        with_rotary(engine.layout, wrong), engine._proofs.cached_alone(engine.compute), 512, torch.float64
    )
    assert not proof.exact
    assert "layer 1" in proof.reason


@pytest.mark.parametrize("fault", ["pairing", "order"])
def test_a_wrong_arrangement_is_put_right(fault: str) -> None:
    """A layout with a wrong arrangement of channels is corrected by what holds for the model's keys."""
    engine = tiny_engine("llama")
    rotary = engine.layout.layers[1].rotary
    assert rotary is not None
    wrong = rotary.paired(Pairing.INTERLEAVED) if fault == "pairing" else Rotary(rotary.frequencies[::-1])
    proof = prove_relocation(
        with_rotary(engine.layout, wrong), engine._proofs.cached_alone(engine.compute), 512, torch.float64
    )
    assert proof.exact
    assert proof.layout.layers[1].rotary == rotary


def with_rotary(layout: KVLayout, rotary: Rotary) -> KVLayout:
    """The layout with layer 1's rotation replaced, and without another table in which the right one could be found."""
    layers = (layout.layers[0], replace(layout.layers[1], rotary=rotary), *layout.layers[2:])
    return replace(layout, layers=layers, tables=())


def test_relocated_chunk_equals_the_chunk_prefilled_there(model_type: str) -> None:
    engine = tiny_engine(model_type)
    layout = engine.require_relocation()
    moved, there = engine.new_buffer(), engine.new_buffer()
    engine.compute(moved, Rows(tuple(IDS), tuple(range(40)), tuple(range(40))), logits=0)
    engine.compute(there, Rows(tuple(IDS), tuple(range(40)), tuple(range(300, 340))), logits=0)
    moved.relocate(0, 40, 0, 300, layout)
    off_by_one = engine.new_buffer()
    engine.compute(off_by_one, Rows(tuple(IDS), tuple(range(40)), tuple(range(40))), logits=0)
    off_by_one.relocate(0, 40, 0, 301, layout)
    for index in range(len(moved)):
        tolerance = 1e-4 * float(there.keys(index).norm(dim=-1).max())
        torch.testing.assert_close(moved.keys(index), there.keys(index), rtol=0, atol=tolerance)
        torch.testing.assert_close(moved.values(index), there.values(index), rtol=0, atol=tolerance)
        turning = layout.layers[index].rotated
        wrong, right = (getattr(buffer, turning)(index) for buffer in (off_by_one, there))
        assert float((wrong - right).abs().max()) > 100 * tolerance


def test_a_thousand_moves_are_bit_identical_to_one() -> None:
    engine = tiny_engine("llama", dtype=torch.bfloat16)
    layout = engine.require_relocation()
    often, once = engine.new_buffer(), engine.new_buffer()
    for buffer in (often, once):
        engine.append(buffer, IDS, logits=0)
    for step in range(1000):
        often.relocate(10, 40, 10, 3 if step % 2 else -2, layout)
    once.relocate(10, 40, 10, 500, layout)
    for index in range(len(often)):
        assert torch.equal(often.keys(index), once.keys(index))
    assert often.positions.tolist() == once.positions.tolist()


def test_learned_positions_are_refused() -> None:
    engine = tiny_engine("gpt2", n_positions=1024, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(UnverifiedError, match="learned position embeddings"):
        engine.require_relocation()


def test_dynamic_frequencies_relocate_within_what_the_model_has() -> None:
    """Dynamic frequencies change only beyond the configured length, which no engine goes beyond."""
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    engine = tiny_engine("llama", rope_parameters=frozen(parameters))
    assert engine.relocation.within == engine.layout.position_limit
    engine.require_relocation()


def test_a_regime_is_not_left_unasked() -> None:
    parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256,
        "short_factor": (1.0, 1.0, 1.5, 2.0), "long_factor": (2.0, 4.0, 4.0, 8.0),
    }  # fmt: skip
    engine = tiny_engine("llama", rope_parameters=frozen(parameters))
    with pytest.raises(UnverifiedError, match="positions below 256"):
        engine.require_relocation()
    with pytest.raises(UnverifiedError, match="within a bound"):
        engine.require_relocation(below=257)
    assert engine.require_relocation(below=256) is engine.relocation.layout


def test_which_cached_tensor_turns() -> None:
    """MLA caches its rotary keys in the place of values. A buffer cannot relocate a layer in which both rotate."""
    assert {layer.rotated for layer in tiny_engine("minicpm3").require_relocation().layers} == {"values"}
    rotary = Rotary((1.0,))
    both = LayerLayout(Reach.FULL, None, rotary, others=(("values", rotary),))
    assert both.rotated == "keys"
    assert both.rotates_more
    assert not replace(both, rotary=None).rotates_more
    engine = Engine(tiny_model("llama"))
    exact = engine.relocation
    engine._proofs._relocation = replace(exact, layout=replace(exact.layout, layers=(both, both)))
    with pytest.raises(UnverifiedError, match="more than one rotating tensor"):
        engine.require_relocation()


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    ],
    ids=lambda parameters: str(parameters["rope_type"]),
)  # fmt: skip
def test_scaled_rope_relocates_exactly(parameters: dict[str, Any]) -> None:
    assert tiny_engine("llama", rope_parameters=frozen(parameters)).relocation.exact


def test_recurrent_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="caches a state"):
        tiny_engine("mamba", state_size=8, expand=2)


def test_overflow_is_refused_before_anything_is_written() -> None:
    engine = tiny_engine("llama", max_position_embeddings=32)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:30], logits=0)
    with pytest.raises(ContextOverflowError, match="32 positions"):
        engine.append(buffer, IDS[:5])
    assert buffer.length == 30


def test_nan_logits_are_reported() -> None:
    engine = tiny_engine("llama", max_position_embeddings=64)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:10], logits=0)
    buffer.layers[0].values[:, :, 3] = float("nan")
    with pytest.raises(NonFiniteLogitsError):
        engine.append(buffer, IDS[10:12])


@pytest.mark.parametrize("chunk", [1, 7, 13, 40, 41])
def test_chunks_change_nothing(model_type: str, chunk: int) -> None:
    engine = tiny_engine(model_type)
    expected, logits = full_forward(engine.model, IDS)
    buffer = engine.new_buffer()
    seen: list[tuple[int, int]] = []
    last = engine.append(buffer, IDS, logits=3, chunk=chunk, progress=lambda done, total: seen.append((done, total)))
    assert_rows_equal(buffer, expected, range(40), atol=atol(model_type))
    torch.testing.assert_close(last, logits[-3:], rtol=0, atol=10 * atol(model_type))
    assert seen[-1] == (40, 40)
    assert len(seen) >= 40 // max(chunk, 3)
    assert engine.meter.tokens_computed == 40


def test_chunks_of_rows_in_the_middle_and_at_the_end(model_type: str) -> None:
    engine = tiny_engine(model_type)
    changed = list(IDS)
    changed[4:6] = [77, 78]
    expected, _ = full_forward(engine.model, changed)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:30], logits=0)
    slots = tuple(range(4, 40))
    engine.compute(buffer, Rows(tuple(changed[4:]), slots, slots), chunk=5)
    assert_rows_equal(buffer, expected, range(40), atol=atol(model_type))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_prefill_leaves_the_buffer_as_long_as_before(error: type[BaseException]) -> None:
    engine = tiny_engine("llama")
    expected, _ = full_forward(engine.model, IDS)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:10], logits=0)
    mark = buffer.mark()

    def interrupt(done: int, total: int) -> None:
        if done >= 12:
            raise error

    rows = Rows((77, *IDS[10:]), (4, *range(10, 40)), (4, *range(10, 40)))
    with pytest.raises(error):
        engine.compute(buffer, rows, chunk=6, progress=interrupt)
    assert buffer.length == 10
    assert all(layer.length == 10 for layer in buffer.layers)
    assert largest_difference(buffer, expected, [4]) > 1e-3, "an overwritten row comes back with a rollback only"
    buffer.rollback(mark)
    engine.append(buffer, IDS[10:], logits=0)
    assert_rows_equal(buffer, expected, range(40), atol=1e-10)


def test_wrong_arguments_are_refused_before_anything_is_written() -> None:
    engine = tiny_engine("llama")
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:5], logits=0)
    calls: list[Any] = [
        lambda: engine.append(buffer, [512]),
        lambda: engine.append(buffer, [-1]),
        lambda: engine.append(buffer, ["a"]),  # type: ignore[list-item]
        lambda: engine.append(buffer, [1.5]),  # type: ignore[list-item]
        lambda: engine.append([], [3]),  # type: ignore[arg-type]
        lambda: engine.append(buffer, [3], logits=-1),
        lambda: engine.append(buffer, [3], logits=True),
        lambda: engine.append(buffer, [3], chunk=0),
        lambda: engine.compute(buffer, [3]),  # type: ignore[arg-type]
        lambda: engine.attention_of(buffer, [3]),  # type: ignore[arg-type]
        lambda: Engine("a model"),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError):
            call()
    with pytest.raises(CacheBufferError, match="no slots"):
        engine.append(buffer, [])
    assert buffer.length == 5


def test_layouts_read_from_the_models() -> None:
    gemma = KVLayout.read(tiny_model("gemma3_text"))
    assert [layer.reach for layer in gemma.layers] == [Reach.SLIDING, Reach.FULL, Reach.SLIDING]
    assert gemma.layers[0].window == 8
    assert gemma.layers[0].rotary != gemma.layers[1].rotary, "each layer type has its own theta"
    neox = KVLayout.read(tiny_model("gpt_neox"))
    assert neox.layers[0].rotary is not None
    assert neox.layers[0].rotary.width == 2, "a quarter of the 8 channels rotates"


def test_every_tiny_type_is_loaded() -> None:
    assert len(TINY) == 9
