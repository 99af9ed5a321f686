"""The check of relocation passes where it should and detects every fault: each guard is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import frozen, tiny_engine, tiny_model
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.rotation import Rotary
from programmable_kv.engine import Engine
from programmable_kv.verify.alone import prefill_alone
from programmable_kv.verify.relocation import (
    CachedLayer,
    PositionEncoding,
    RelocationProof,
    Verdict,
    prove_relocation,
)

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128}
Tamper = Callable[[Sequence[int], torch.Tensor | None], list[CachedLayer]]


def prove(model: Any, layout: KVLayout | None = None, tamper: Any = None) -> RelocationProof:
    def prefill(ids: Sequence[int], positions: torch.Tensor | None, *, padding: int = 0) -> list[CachedLayer]:
        if tamper is not None:
            return tamper(ids, positions, padding)  # type: ignore[no-any-return]
        return prefill_alone(model, ids, positions, padding=padding)

    return prove_relocation(layout or KVLayout.read(model), prefill, 512, model.dtype)


def with_frequencies(layout: KVLayout, change: Callable[[tuple[float, ...]], tuple[float, ...]]) -> KVLayout:
    """The layout with layer 1's frequencies changed, and without another table that has the right ones."""
    rotary = layout.layers[1].rotary
    assert rotary is not None
    wrong = replace(layout.layers[1], rotary=Rotary(change(rotary.frequencies)))
    return replace(layout, layers=(layout.layers[0], wrong, *layout.layers[2:]), tables=())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda f: tuple(each * 1.3 for each in f),
        lambda f: (*f[:-1], f[-1] * 1.3),
        lambda f: tuple(each / 8 for each in f),
    ],
    ids=["theta", "the slowest frequency", "scaling"],
)
def test_wrong_frequencies_are_caught(change: Any, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    assert prove(model).exact
    proof = prove(model, with_frequencies(KVLayout.read(model), change))
    assert proof.verdict is Verdict.REFUSED
    assert "layer 1" in proof.reason


def test_a_small_error_of_theta_is_caught() -> None:
    model = tiny_model("llama")
    proof = prove(model, with_frequencies(KVLayout.read(model), lambda f: tuple(each * (1 + 1e-6) for each in f)))
    assert not proof.exact


def test_a_forgotten_scaling_is_caught() -> None:
    scaled = tiny_model("llama", rope_parameters=frozen(YARN))
    plain = KVLayout.read(tiny_model("llama")).layers[1].rotary
    assert plain is not None
    assert prove(scaled).exact
    assert not prove(scaled, with_frequencies(KVLayout.read(scaled), lambda _: plain.frequencies)).exact


def test_which_channels_turn_together_is_found_on_the_keys() -> None:
    halves = prove(tiny_model("llama")).layout.layers[0].rotary
    neighbours = prove(tiny_model("glm", head_dim=8)).layout.layers[0].rotary
    assert halves is not None
    assert neighbours is not None
    assert halves.pairing != neighbours.pairing


def shifted_by_one(model: Any) -> Any:
    """A model whose keys are rotated to one position beyond the one asked for."""

    def tamper(ids: Sequence[int], positions: torch.Tensor | None, padding: int) -> list[CachedLayer]:
        off = positions + (positions[0] > 0) if positions is not None else None
        return prefill_alone(model, ids, off, padding=padding)

    return tamper


def scaled_again(model: Any) -> Any:
    """A model whose attention factor is applied once more to keys that move."""

    def tamper(ids: Sequence[int], positions: torch.Tensor | None, padding: int) -> list[CachedLayer]:
        layers = prefill_alone(model, ids, positions, padding=padding)
        if positions is None or int(positions[0]) == 0:
            return layers
        factor = float(model.model.rotary_emb.attention_scaling)
        return [{**layer, "keys": layer["keys"] * factor} for layer in layers]

    return tamper


def standing_still(model: Any) -> Any:
    """A model that ignores given positions, as BART does, and counts its own from the cache."""

    def tamper(ids: Sequence[int], positions: torch.Tensor | None, padding: int) -> list[CachedLayer]:
        given = None if positions is None else torch.arange(len(ids))
        return prefill_alone(model, ids, given, padding=padding)

    return tamper


@pytest.mark.parametrize("fault", [shifted_by_one, scaled_again, standing_still])
def test_a_wrong_movement_is_caught(fault: Any) -> None:
    model = tiny_model("llama", rope_parameters=frozen(YARN))
    assert float(model.model.rotary_emb.attention_scaling) > 1
    proof = prove(model, tamper=fault(model))
    assert proof.verdict is Verdict.REFUSED
    assert proof.worst > 1


def test_ignored_positions_are_told_from_alibi() -> None:
    """With given positions neither changes. When they count themselves, one changes in its hidden states."""
    ignoring = prove(tiny_model("bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48))
    assert ignoring.verdict is Verdict.REFUSED
    assert ignoring.encoding is PositionEncoding.LEARNED
    assert "by the model's own count" in ignoring.reason
    alibi = prove(tiny_model("bloom", "eager", n_layer=2, n_head=4))
    assert alibi.verdict is Verdict.EXACT
    assert alibi.encoding is PositionEncoding.NONE_CACHED
    assert alibi.tells_order, "its distances must be seen to matter"


def test_learned_positions_are_told_as_such() -> None:
    proof = prove(tiny_model("gpt2", n_positions=1024, n_embd=32, n_layer=2, n_head=4))
    assert proof.encoding is PositionEncoding.LEARNED


def test_layers_without_rotation_are_found() -> None:
    proof = prove(tiny_model("smollm3", num_hidden_layers=4))
    assert [layer.rotary is not None for layer in proof.layout.layers] == [True, True, True, False]


def test_two_regimes_of_frequencies() -> None:
    factors = tuple(1.0 + i / 4 for i in range(4))
    settings = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256,
        "short_factor": factors, "long_factor": tuple(4 * f for f in factors),
    }  # fmt: skip
    proof = prove(tiny_model("llama", rope_parameters=frozen(settings)))
    assert proof.verdict is Verdict.WITHIN
    assert proof.within == 256
    same = frozen({**settings, "long_factor": factors})
    assert prove(tiny_model("llama", rope_parameters=same)).verdict is Verdict.EXACT, (
        "a bound that changes nothing is none"
    )


def test_the_engine_proves_what_it_runs(model_type: str) -> None:
    """Through the buffer and its own masks, the check finds the same layout as through transformers' cache."""
    engine = tiny_engine(model_type)
    assert engine.relocation.layout == prove(engine.model).layout


def test_the_check_is_on_nobodys_account() -> None:
    engine = Engine(tiny_model("llama"))
    assert engine.relocation.exact
    assert engine.meter.tokens_computed == 0


def test_what_is_not_finite_is_no_proof() -> None:
    """NaN is neither above nor below a tolerance."""
    model = tiny_model("llama")

    def tamper(ids: Sequence[int], positions: torch.Tensor | None, padding: int) -> list[CachedLayer]:
        layers = prefill_alone(model, ids, positions, padding=padding)
        return (
            [{name: tensor * float("nan") for name, tensor in layer.items()} for layer in layers]
            if len(ids) == 1
            else layers
        )

    assert not prove(model, tamper=tamper).exact


def test_too_few_positions_prove_nothing() -> None:
    proof = prove(tiny_model("llama", max_position_embeddings=16))
    assert proof.verdict is Verdict.REFUSED
    assert "too few" in proof.reason
