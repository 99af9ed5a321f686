"""Models whose frequencies or masks depend on the length: every result equals a full forward or is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import frozen, tiny_engine, tiny_model
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import CacheBufferError, FrequencyRegimeError
from reference import assert_rows_equal, full_forward, largest_difference

BOUND = 64
IDS = [int(i) for i in torch.randint(3, 500, (120,), generator=torch.Generator().manual_seed(7))]


class Numbers(list[Any]):
    """A hashable list, so that `tiny_model` can cache by it; transformers takes no tuple here."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


LONGROPE = frozen({
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": BOUND,
    "short_factor": Numbers((1.0, 1.0, 1.5, 2.0)), "long_factor": Numbers((2.0, 4.0, 4.0, 8.0)),
})  # fmt: skip
DYNAMIC = frozen({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})


def longrope(model_type: str = "phi3", **changes: Any) -> Engine:
    if model_type == "phi3":  # phi3's configuration has the bound as an attribute of its own
        changes["original_max_position_embeddings"] = BOUND
    return tiny_engine(model_type, rope_parameters=LONGROPE, **changes)


@pytest.fixture(params=["phi3", "llama"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return longrope(str(request.param))


def filled(engine: Engine, count: int) -> KVBuffer:
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:count], logits=0)
    return buffer


def is_full_prefill(engine: Engine, buffer: KVBuffer) -> None:
    expected, _ = full_forward(engine.model, IDS[: buffer.length])
    assert_rows_equal(buffer, expected, range(buffer.length), atol=1e-10)


def test_the_attack_is_real(engine: Engine) -> None:
    """Negative check: rows computed below the bound differ from those of a full forward beyond it."""
    longer, _ = full_forward(engine.model, IDS[:90])
    assert largest_difference(filled(engine, 60), longer, range(60)) > 1e-2


def test_appending_across_the_bound_is_refused(engine: Engine) -> None:
    buffer = filled(engine, 60)
    with pytest.raises(FrequencyRegimeError, match="beyond 64 positions"):
        engine.append(buffer, IDS[60:90])
    assert buffer.length == 60
    engine.append(buffer, IDS[60:64])
    is_full_prefill(engine, buffer)
    with pytest.raises(FrequencyRegimeError):
        engine.append(buffer, IDS[64:65])
    is_full_prefill(engine, buffer)


@pytest.mark.parametrize("chunk", [8, 70, 2048])
def test_a_prefill_beyond_the_bound_is_consistent_in_any_chunks(engine: Engine, chunk: int) -> None:
    buffer = engine.new_buffer()
    seen: list[int] = []
    engine.append(buffer, IDS[:100], logits=0, chunk=chunk, progress=lambda done, total: seen.append(done))
    is_full_prefill(engine, buffer)
    engine.append(buffer, IDS[100:110], logits=0)
    is_full_prefill(engine, buffer)
    assert seen[0] >= min(BOUND + 1, 100)
    assert (len(seen) > 3) is (chunk == 8)


def test_rows_in_the_middle_of_a_long_context_need_one_that_reaches_beyond(engine: Engine) -> None:
    buffer = filled(engine, 100)
    with pytest.raises(FrequencyRegimeError):
        engine.compute(buffer, Rows((IDS[5],), (5,), (5,)))
    is_full_prefill(engine, buffer)
    engine.compute(buffer, Rows((IDS[5], IDS[99]), (5, 99), (5, 99)))
    is_full_prefill(engine, buffer)


def test_a_long_context_cut_short_keeps_its_frequencies(engine: Engine) -> None:
    buffer = filled(engine, 100)
    buffer.truncate(40)
    with pytest.raises(FrequencyRegimeError):
        engine.append(buffer, IDS[40:50])
    copies = [buffer.fork(), KVBuffer(engine.layout)]
    copies[1].load_tensors(buffer.tensors())
    for copy in copies:
        with pytest.raises(FrequencyRegimeError):
            engine.append(copy, IDS[40:50])
    engine.append(buffer, IDS[40:90])
    is_full_prefill(engine, buffer)


def test_a_context_cut_short_does_not_fit_its_length(engine: Engine) -> None:
    buffer = filled(engine, 100)
    assert buffer.fits_its_length
    buffer.truncate(65)
    assert buffer.fits_its_length
    buffer.truncate(64)
    assert not buffer.fits_its_length
    fresh, _ = full_forward(engine.model, IDS[:64])
    assert largest_difference(buffer, fresh, range(64)) > 1e-2
    buffer.truncate(0)
    assert buffer.fits_its_length
    assert filled(tiny_engine("llama"), 9).fits_its_length


def test_an_emptied_buffer_starts_anew_and_a_rollback_remembers(engine: Engine) -> None:
    buffer = filled(engine, 100)
    mark = buffer.mark()
    buffer.truncate(0)
    engine.append(buffer, IDS[:50])
    is_full_prefill(engine, buffer)
    buffer.rollback(mark)
    with pytest.raises(FrequencyRegimeError):
        engine.compute(buffer, Rows((IDS[5],), (5,), (5,)))
    engine.append(buffer, IDS[100:105])
    is_full_prefill(engine, buffer)


def test_rows_that_replace_all_others_are_no_mixture(engine: Engine) -> None:
    buffer = filled(engine, 100)
    buffer.truncate(50)
    slots = tuple(range(50))
    engine.compute(buffer, Rows(tuple(IDS[:50]), slots, slots))
    is_full_prefill(engine, buffer)


def test_a_plan_can_ask_first(engine: Engine) -> None:
    buffer = filled(engine, 60)
    engine.require_same_regime(buffer, 60, 63)
    engine.require_same_regime(buffer, 0, 90)
    for first, last in ((60, 64), (30, 64)):
        with pytest.raises(FrequencyRegimeError):
            engine.require_same_regime(buffer, first, last)
    longer = filled(engine, 100)
    engine.require_same_regime(longer, 90, 105)
    with pytest.raises(FrequencyRegimeError):
        engine.require_same_regime(longer, 5, 6)
    engine.require_same_regime(engine.new_buffer(), 0, 90)


def test_a_stream_ends_at_the_bound(engine: Engine) -> None:
    buffer = engine.new_buffer()
    stream = engine.stream(buffer, engine.append(buffer, IDS[:60]), frozenset())
    for _ in range(5):
        next(stream)
    with pytest.raises(FrequencyRegimeError):
        next(stream)
    assert buffer.length == BOUND


def test_transformers_own_generate_is_stopped_at_the_bound() -> None:
    """phi3 is left out: its own `generate` drops the cache there and starts another one."""
    engine = longrope("llama")
    buffer = filled(engine, 60)
    with pytest.raises(FrequencyRegimeError):
        engine.model.generate(
            torch.tensor([IDS[:61]]), past_key_values=buffer, max_new_tokens=9, do_sample=False, eos_token_id=None
        )
    assert buffer.length == BOUND


def test_keys_of_the_long_table_are_not_relocated(engine: Engine) -> None:
    layout = engine.require_relocation(below=BOUND)
    short, long = filled(engine, 30), filled(engine, 100)
    segment = short.segment(Span(0, 10), IDS[:10])
    of_other_tables = long.segment(Span(0, 10), IDS[:10])
    long.truncate(40)
    operations = [
        lambda: long.relocate(20, 40, 21, 1, layout),
        lambda: long.exchange(3, 5, 9, layout),
        lambda: long.insert(40, segment, layout),
        lambda: short.insert(30, of_other_tables, layout),
        lambda: short.insert(30, of_other_tables.part(Span(2, 5)), layout),
        lambda: engine.new_buffer().insert(0, of_other_tables, layout),
    ]
    for operation in operations:
        with pytest.raises(FrequencyRegimeError, match="relocation"):
            operation()
    assert (long.length, short.length) == (40, 30)
    short.insert(30, segment, layout)
    assert short.length == 40
    with pytest.raises(FrequencyRegimeError, match="relocation"):
        short.relocate(20, 40, 20, 25, layout)
    nearly = filled(engine, 60)
    with pytest.raises(FrequencyRegimeError, match="relocation"):
        nearly.insert(30, segment, layout)
    nearly.insert(30, segment, layout, replacing=6)
    assert nearly.next_position == BOUND
    spliced = engine.new_buffer()
    spliced.insert(0, segment, layout)
    with pytest.raises(FrequencyRegimeError):
        engine.append(spliced, IDS[10:90])


def test_tensors_that_do_not_say_their_frequencies_are_refused(engine: Engine) -> None:
    named = filled(engine, 100).tensors()
    del named["frequencies"]
    with pytest.raises(CacheBufferError, match="do not say which frequencies"):
        KVBuffer(engine.layout).load_tensors(named)
    assert "frequencies" not in filled(tiny_engine("llama"), 10).tensors()


def test_checks_do_not_depend_on_what_was_computed_before(engine: Engine) -> None:
    full_forward(engine.model, IDS[:100])
    again = Engine(engine.model)
    assert again.layout == engine.layout
    assert again.rows.exact
    assert again.relocation.exact, again.relocation.reason


def test_dynamic_frequencies_do_not_depend_on_what_was_computed_before() -> None:
    """After a long forward, transformers keeps its table for shorter ones, down to the configured length."""
    settings: dict[str, Any] = {"rope_parameters": DYNAMIC, "max_position_embeddings": BOUND}
    engine = tiny_engine("llama", **settings)
    expected, _ = full_forward(tiny_model("llama", **settings), IDS[:BOUND])
    expected = [(keys.clone(), values.clone()) for keys, values in expected]
    stretched, _ = full_forward(engine.model, IDS[:100])
    assert float((stretched[0][0][:, :, :BOUND] - expected[0][0]).abs().max()) > 1e-3
    assert_rows_equal(filled(engine, BOUND), expected, range(BOUND), atol=1e-10)


def test_beyond_its_bound_a_dynamic_model_takes_one_forward() -> None:
    engine = Engine(tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=BOUND))
    engine.layout = replace(engine.layout, position_limit=None)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:90], logits=0, chunk=16)
    is_full_prefill(engine, buffer)
    with pytest.raises(FrequencyRegimeError, match="dynamic"):
        engine.append(buffer, IDS[90:91])
    with pytest.raises(FrequencyRegimeError):
        engine.append(filled(engine, 50), IDS[50:70])
    assert buffer.length == 90


CHUNKED: dict[str, Any] = {
    "attention_chunk_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
    "head_dim": 8, "no_rope_layers": Numbers((1, 1, 0)), "num_hidden_layers": 3,
    "layer_types": Numbers(("chunked_attention", "chunked_attention", "full_attention")),
}  # fmt: skip


def test_chunked_attention_is_right_across_chunks() -> None:
    """The tolerance is that of float32: the model computes its rotation in float32, whatever its dtype is."""
    engine = tiny_engine("llama4_text", **CHUNKED)
    assert {layer.window for layer in engine.layout.layers} == {16, None}
    expected, logits = full_forward(engine.model, IDS[:60])
    buffer = engine.new_buffer()
    for stop in (10, 15, 40, 41, 60):
        last = engine.append(buffer, IDS[buffer.length : stop])
        torch.testing.assert_close(last[0], logits[stop - 1], rtol=0, atol=1e-5)
    assert_rows_equal(buffer, expected, range(60), atol=1e-6)
    for slots in ([3], [14, 15, 16, 17], [20, 31, 32, 47], list(range(60))):
        engine.compute(buffer, Rows(tuple(IDS[s] for s in slots), tuple(slots), tuple(slots)))
        assert_rows_equal(buffer, expected, range(60), atol=1e-6)
    chunked = engine.new_buffer()
    engine.append(chunked, IDS[:60], chunk=7, logits=0)
    assert_rows_equal(chunked, expected, range(60), atol=1e-6)
