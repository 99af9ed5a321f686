"""Several threads on one model: every result equals that of a single thread, and accounts do not mix."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from conftest import tiny_engine, tiny_model
from programmable_kv.account import BufferMeter, Meter
from programmable_kv.cache.attention import recording
from programmable_kv.cache.transformers_api import GROUPED_SDPA, grouped_sdpa, register_attention
from programmable_kv.engine import Engine, Rows
from programmable_kv.model_lock import lock_of

IDS = [int(i) for i in torch.randint(3, 500, (60,), generator=torch.Generator().manual_seed(5))]
THREADS, TURNS = 4, 15


def influence(engine: Engine, seed: int) -> torch.Tensor:
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[seed : seed + 30], logits=0)
    found = engine.attention_of(buffer, Rows.appended(IDS[:3], 30, 30))
    assert buffer.length == 30
    return found


def prefill_and_suffix(engine: Engine, seed: int) -> torch.Tensor:
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[seed : seed + 20], logits=0)
    return engine.append(buffer, IDS[seed + 20 : seed + 40], logits=3)


def rows_in_the_middle(engine: Engine, seed: int) -> torch.Tensor:
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[seed : seed + 30], logits=0)
    return engine.compute(buffer, Rows((7, 8), (4, 9), (4, 9)))


WORK: list[tuple[Callable[[Engine, int], torch.Tensor], int]] = [
    (influence, 33), (prefill_and_suffix, 40), (rows_in_the_middle, 32), (prefill_and_suffix, 40),
]  # fmt: skip
"""what each thread does repeatedly, and how many tokens it computes"""


@pytest.mark.parametrize("attention", ["sdpa", "eager", GROUPED_SDPA])
def test_threads_do_not_disturb_each_other(attention: str) -> None:
    """Each thread has its own engine around the same model, because the lock belongs to the model."""
    register_attention()
    model = tiny_model("llama", attention)
    alone = {(job, seed): job(Engine(model), seed) for job, _ in WORK for seed in range(TURNS)}
    start = threading.Barrier(THREADS)

    def repeat(number: int) -> tuple[list[torch.Tensor], list[int]]:
        engine, (job, _) = Engine(model), WORK[number]
        engine.verify()
        start.wait(timeout=60)
        results, counts = [], []
        for seed in range(TURNS):
            with engine.meter.measure() as reading:
                results.append(job(engine, seed))
            counts.append(reading.account.tokens_computed)
        return results, counts

    with ThreadPoolExecutor(THREADS) as pool:
        done = list(pool.map(repeat, range(THREADS)))
    for (job, tokens), (results, counts) in zip(WORK, done, strict=True):
        for seed, result in enumerate(results):
            torch.testing.assert_close(result, alone[job, seed], rtol=0, atol=1e-12, msg=f"{job.__name__} {seed}")
        assert counts == [tokens] * TURNS
    assert model.config._attn_implementation == attention


def test_one_engine_in_several_threads_counts_for_each() -> None:
    engine = tiny_engine("llama")
    engine.verify()
    start = threading.Barrier(THREADS)

    def work(tokens: int) -> list[int]:
        start.wait(timeout=60)
        counts = []
        for _ in range(10):
            with engine.meter.measure() as reading:
                engine.append(engine.new_buffer(), IDS[:tokens], logits=0)
            counts.append(reading.account.tokens_computed)
        return counts

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, [3, 11, 17, 23])) == [[3] * 10, [11] * 10, [17] * 10, [23] * 10]


def test_several_threads_may_verify_at_once() -> None:
    engine = Engine(copy.deepcopy(tiny_model("llama")))
    with ThreadPoolExecutor(THREADS) as pool:
        proofs = list(pool.map(lambda _: (engine.verify(), engine.relocation, engine.rows)[1:], range(THREADS)))
    assert all(proof[0] is proofs[0][0] and proof[1] is proofs[0][1] for proof in proofs), "checked once"
    assert proofs[0][0].exact
    assert engine.meter.tokens_computed == 0


def test_a_buffers_meter_follows_it_through_threads() -> None:
    """A server may draw one stream from several threads, so the buffer's meter measures it."""
    engine = tiny_engine("llama")
    buffer = engine.new_buffer()
    with buffer.meter.measure() as reading, engine.meter.measure() as here:
        engine.append(buffer, IDS[:5], logits=0)
        thread = threading.Thread(target=engine.append, args=(buffer, IDS[5:12]))
        thread.start()
        thread.join()
    assert buffer.length == 12
    assert reading.account.tokens_computed == 12
    assert here.account.tokens_computed == 5


def test_meters() -> None:
    shared = Meter()
    meter = BufferMeter(shared)
    with meter.measure() as reading, shared.measure() as all_of_it:
        meter.count(computed=2, moved=10)
        meter.count(relocated=3)
        shared.count(computed=1)
    assert (reading.account.tokens_computed, reading.account.tokens_relocated, reading.account.bytes_moved) == (
        2,
        3,
        10,
    )
    assert all_of_it.account.tokens_computed == 3


def test_the_lock_is_the_models_and_goes_with_it() -> None:
    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert lock_of(model) is lock_of(model)
    assert lock_of(model) is not lock_of(other)
    with lock_of(model), lock_of(model):
        copy.deepcopy(model)


@pytest.mark.parametrize("job", [influence, prefill_and_suffix, rows_in_the_middle])
def test_no_forward_runs_beside_another(job: Callable[[Engine, int], torch.Tensor]) -> None:
    """A job waits while another engine's forward runs on the model, and finishes after it."""
    engine = Engine(tiny_model("llama"))
    engine.verify()
    job(engine, 0)
    with ThreadPoolExecutor(1) as pool:
        with lock_of(engine.model):
            waiting = pool.submit(job, engine, 0)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        waiting.result(timeout=60)


# -- what the last row attends to ------------------------------------------------------------------------------


def by_eager_attention(model: Any, engine: Engine, count: int) -> torch.Tensor:
    """The same influence, computed from transformers' own eager attention over a whole prefill."""
    with torch.no_grad():
        output = model(torch.tensor([IDS[:count]]), output_attentions=True, use_cache=True)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:count], logits=0)
    total = torch.zeros(count)
    for index, attention in enumerate(output.attentions):
        rotated = engine.relocation.layout.layers[index].rotated
        read = buffer.values(index) if rotated == "keys" else buffer.keys(index)
        norms = read[0].float().norm(dim=-1)
        weights = attention[0, :, -1].float()
        total += (weights * norms.repeat_interleave(weights.shape[0] // norms.shape[0], dim=0)).mean(dim=0)
    return total / len(output.attentions)


@pytest.mark.parametrize("attention", ["sdpa", "eager", GROUPED_SDPA])
def test_influence_is_that_of_eager_attention(model_type: str, attention: str) -> None:
    register_attention()
    if model_type == "gemma2" and attention != "eager":
        pytest.skip("transformers implements this model's soft-capped scores in eager attention only")
    expected = by_eager_attention(tiny_model(model_type, "eager"), tiny_engine(model_type, "eager"), 30)
    engine = Engine(tiny_model(model_type, attention))
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:27], logits=0)
    found = engine.attention_of(buffer, Rows.appended(IDS[27:30], 27, 27))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert buffer.length == 27
    assert engine.model.config._attn_implementation == attention


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
def test_soft_capped_scores_equal_transformers_formula(tokens: int, masked: bool) -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    generator = torch.Generator().manual_seed(1)
    query = 4 * torch.randn(1, 4, tokens, 8, generator=generator)
    key, value = (4 * torch.randn(1, 2, 9, 8, generator=generator) for _ in range(2))
    causal = torch.ones(tokens, 9, dtype=torch.bool).tril(9 - tokens)
    causal[:, 2] &= not masked
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)[None, None]
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    expected, weights = eager_attention_forward(module, query, key, value, additive, scaling=0.3, softcap=5.0)
    with recording() as recorded:
        mask = causal[None, None] if masked else None
        found, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.3, softcap=5.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(recorded[0].weights, weights[0, :, -1])
    uncapped, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    assert float((uncapped - expected).abs().max()) > 1e-2, "the cap matters here"
