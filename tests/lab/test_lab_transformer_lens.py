"""The same four interventions in TransformerLens, on one tiny model: log-probabilities agree within 1e-4.

TransformerLens is no dependency (it brings datasets and wandb). To run this: `pip install transformer-lens`.
Its forwards are uncached, so what a cache holds fixed is pinned here: keys and values of every earlier row.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from conftest import tiny_model, tokenizer
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine, Rows
from programmable_kv.lab.tools.changes import of_heads, replaced
from programmable_kv.lab.tools.knockout import Knockout, knocked_out
from programmable_kv.lab.tools.kv import patched
from programmable_kv.lab.tools.lens import logit_lens
from programmable_kv.lab.tools.sites import Place, Site, changed, recorded

N = 18
OLD = [(7 + 31 * i) % 500 for i in range(N)]
NEW = [*OLD[:4], 401, 402, *OLD[6:]]
LAST = Rows((OLD[-1],), (N - 1,), (N - 1,))
LAYERS = 2
WITHIN = 1e-4


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    lens = pytest.importorskip(
        "transformer_lens.model_bridge", reason="TransformerLens is not installed: an optional check"
    )
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llama", "eager", torch.float32)
    model.save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    with torch.no_grad():
        # It changes the model that it wraps.
        return lens.TransformerBridge.boot_transformers(str(folder), hf_model=copy.deepcopy(model), device="cpu")


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_model("llama", "eager", torch.float32))


def prefilled(engine: Engine, ids: list[int]) -> KVBuffer:
    buffer = engine.new_buffer()
    engine.append(buffer, ids[:-1], logits=0)
    return buffer


@torch.no_grad()
def activations(bridge: Any, ids: list[int]) -> Any:
    return bridge.run_with_cache(torch.tensor([ids]))[1]


@torch.no_grad()
def last_with(bridge: Any, hooks: list[tuple[str, Any]]) -> torch.Tensor:
    return bridge.run_with_hooks(torch.tensor([OLD]), fwd_hooks=hooks)[0, -1]


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    worst = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
    assert worst < WITHIN, f"log-probabilities differ by {worst:.1e}"


def test_a_kv_patch(bridge: Any, engine: Engine) -> None:
    old, new = activations(bridge, OLD), activations(bridge, NEW)
    slots = [4, 9, 15]

    def pin(layer: int, name: str) -> tuple[str, Any]:
        key = f"blocks.{layer}.attn.{name}"

        def put(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            # Both are [B, T, ...].
            tensor[:, : N - 1] = old[key][:, : N - 1]
            tensor[:, slots] = new[key][:, slots]
            return tensor

        return key, put

    theirs = last_with(bridge, [pin(layer, name) for layer in range(LAYERS) for name in ("hook_rot_k", "hook_v")])
    buffer, source = prefilled(engine, OLD), prefilled(engine, NEW)
    with patched(buffer, source, slots):
        ours = engine.compute(buffer, LAST)[-1]
    assert_agree(ours, theirs)
    assert float((ours - engine.compute(buffer, LAST)[-1]).abs().max()) > 0.01, "the patch must matter"


def test_a_head_patch(bridge: Any, engine: Engine) -> None:
    new = activations(bridge, NEW)
    buffer, source = prefilled(engine, OLD), prefilled(engine, NEW)
    for layer in range(LAYERS):
        site = Site(Place.HEADS, layer)
        with recorded(engine, source, [site], [N - 1]) as found:
            engine.compute(source, LAST)
        for head in (0, 3):

            def put(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
                heads = tensor.view(1, N, 4, 8)
                heads[0, -1, head] = new[f"blocks.{layer}.attn.hook_z"].view(1, N, 4, 8)[0, -1, head]  # noqa: B023
                return tensor

            theirs = last_with(bridge, [(f"blocks.{layer}.attn.hook_z", put)])
            change = of_heads(replaced(found[site][:, [head]]), [head])
            with changed(engine, buffer, site, change, [N - 1]):
                assert_agree(engine.compute(buffer, LAST)[-1], theirs)


def test_a_knockout(bridge: Any, engine: Engine) -> None:
    keys = (5, 6, 7)

    def block(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores[:, :, -1, list(keys)] = torch.finfo(scores.dtype).min
        return scores

    buffer = prefilled(engine, OLD)
    for band in ((0,), (1,), (0, 1)):
        theirs = last_with(bridge, [(f"blocks.{layer}.attn.hook_attn_scores", block) for layer in band])
        with knocked_out(engine, buffer, Knockout((N - 1,), keys, layers=band)):
            assert_agree(engine.compute(buffer, LAST)[-1], theirs)


@torch.no_grad()
def test_the_logit_lens(bridge: Any, engine: Engine) -> None:
    cache = activations(bridge, OLD)
    streams = [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(LAYERS)]
    streams.append(cache[f"blocks.{LAYERS - 1}.hook_resid_post"])
    found = logit_lens(engine, prefilled(engine, OLD), LAST)
    for ours, stream in zip(found, streams, strict=True):
        assert_agree(ours[-1], bridge.unembed(bridge.ln_final(stream))[0, -1])
