"""Many probes in one forward, the logit lens, attention row by row, attribution, read-outs and nulls."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from conftest import tiny_engine, tiny_model
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.overwrite import Overwrite
from programmable_kv.cache.transformers_api import GROUPED_SDPA, register_attention
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError, NonFiniteLogitsError, UnsupportedModelError
from programmable_kv.lab.tools.attribution import attribute
from programmable_kv.lab.tools.changes import of_heads, replaced
from programmable_kv.lab.tools.knockout import Knockout, knocked_out
from programmable_kv.lab.tools.kv import Which, injected, patched, rows_from
from programmable_kv.lab.tools.lens import attention_by_row, logit_lens
from programmable_kv.lab.tools.nulls import random_basis, random_heads, random_slots
from programmable_kv.lab.tools.readouts import Scale, flip_rate, gap, kl, split_in_half
from programmable_kv.lab.tools.sites import Place, Site, changed, recorded
from programmable_kv.lab.tools.together import Probe, each_place, each_slot, probed

N = 24
OLD = tuple((7 + 31 * i) % 500 for i in range(N))
NEW = (*OLD[:4], 401, 402, *OLD[6:18], 403, *OLD[19:])
TOKEN = OLD[-1]
LAST = Rows((TOKEN,), (N - 1,), (N - 1,))
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt_neox")
SDPA = tuple(family for family in FAMILIES if family != "gemma2")


def prefilled(engine: Engine, ids: tuple[int, ...] = OLD) -> KVBuffer:
    buffer = engine.new_buffer()
    engine.append(buffer, ids[:-1], logits=0)
    return buffer


def contents(buffer: KVBuffer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in buffer.tensors().values()]


def hooks_of(model: Any) -> int:
    """This package's hooks. (transformers leaves some of its own behind when attention weights are asked for.)"""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__module__.startswith("programmable_kv") for hook in hooks)


# -- many probes in one forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager", GROUPED_SDPA])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_many_probes_in_one_forward_are_each_alone(model_type: str, attention: str) -> None:
    if model_type == "gemma2" and attention != "eager":
        pytest.skip("transformers implements this model's soft-capped scores in eager attention only")
    register_attention()
    engine = tiny_engine(model_type, attention)
    old, new = prefilled(engine), prefilled(engine, NEW)
    before = contents(old)
    probes = [
        Probe(),
        Probe(patched=tuple(range(N - 1))),
        Probe(patched=(4, 9, 20)),
        Probe(patched=(18,), layers=(1,)),
        Probe(patched=(17, 18), layers=(0,), heads=(1,)),
        Probe(blocked=(3, 20)),
        Probe(blocked=(21,), layers=(1,)),
    ]
    found = probed(engine, old, TOKEN, probes, new)
    expected = []
    for probe in probes:
        which = Which(probe.layers, probe.heads)
        if probe.blocked:
            with knocked_out(engine, old, Knockout((N - 1,), probe.blocked, probe.layers)):
                expected.append(engine.compute(old, LAST))
        elif probe.patched:
            with patched(old, new, probe.patched, which):
                expected.append(engine.compute(old, LAST))
        else:
            expected.append(engine.compute(old.fork(), LAST))
    # transformers' eager attention rounds its weights to float32.
    allowed = EXACT if attention != "eager" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, torch.cat(expected), **allowed)
    different = (found - found[0]).abs().amax(dim=1)[1:]
    assert float(different.min()) > 1e-7, f"a probe without effect tests nothing: {different}"
    assert all(torch.equal(a, b) for a, b in zip(contents(old), before, strict=True))
    assert hooks_of(engine.model) == 0


def test_many_probes_are_computed_in_parts_and_refused_where_they_make_no_sense() -> None:
    engine = tiny_engine("llama")
    old, new = prefilled(engine), prefilled(engine, NEW)
    places = each_place(engine, old, range(N - 1)) * 3
    assert len(places) == 2 * 2 * (N - 1) * 3 > 256
    found = probed(engine, old, TOKEN, places, new)
    torch.testing.assert_close(found[: len(found) // 3], found[-(len(found) // 3) :], **EXACT)
    assert probed(engine, old, TOKEN, []).numel() == 0
    for probe, source in (
        (Probe((3,)), None),
        (Probe((N,)), new),
        (Probe((3,), heads=(2,)), new),
        (Probe((3,), layers=(2,)), new),
    ):
        with pytest.raises(InvalidArgumentError, match="slot"):
            probed(engine, old, TOKEN, [probe], source)
    moved = engine.new_buffer()
    engine.compute(moved, Rows(OLD[:-1], tuple(range(N - 1)), tuple(range(5, N + 4))), logits=0)
    with pytest.raises(InvalidArgumentError, match="other positions"):
        probed(engine, old, TOKEN, each_slot([3]), moved)
    latent = tiny_engine("minicpm3")
    with pytest.raises(UnsupportedModelError, match="one probe at a time"):
        probed(latent, prefilled(latent), TOKEN, each_slot([3]), prefilled(latent, NEW))


# -- lens and attention ------------------------------------------------------------------------------------------


def test_the_lens_reads_each_layer_with_the_models_own_head(model_type: str) -> None:
    """Each entry is the output of a forward whose final norm is given that layer's stream; the last is the output itself."""
    engine = tiny_engine(model_type)
    buffer = prefilled(engine)
    before = contents(buffer)
    rows = Rows(OLD[-3:], tuple(range(N - 3, N)), tuple(range(N - 3, N)))
    found = logit_lens(engine, buffer, rows, logits=2)
    count = len(buffer)
    sites = [Site(Place.RESIDUAL, layer) for layer in range(count + 1)]
    with recorded(engine, buffer, sites, rows.slots) as streams:
        usual = engine.compute(buffer, rows, logits=2)
    assert found.shape == (count + 1, 2, 512)
    torch.testing.assert_close(found[-1], usual, **EXACT)
    for layer in range(count):
        with changed(engine, buffer, sites[-1], replaced(streams[sites[layer]]), rows.slots):
            torch.testing.assert_close(found[layer], engine.compute(buffer, rows, logits=2), **EXACT)
        assert float((found[layer] - usual).abs().max()) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(contents(buffer), before, strict=True))
    assert hooks_of(engine.model) == 0


def test_the_lens_of_a_broken_model_is_refused() -> None:
    engine = tiny_engine("llama")
    buffer = prefilled(engine)
    broken = replaced(torch.full((1, 32), float("nan")))
    end = Site(Place.RESIDUAL, 2)
    with pytest.raises(NonFiniteLogitsError), changed(engine, buffer, end, broken, [N - 1]):
        logit_lens(engine, buffer, LAST)
    assert hooks_of(engine.model) == 0
    assert buffer.length == N - 1


def test_attention_by_row_is_the_whole_matrix(model_type: str) -> None:
    engine = tiny_engine(model_type)
    buffer = engine.new_buffer()
    engine.append(buffer, OLD, logits=0)
    with torch.no_grad():
        whole = tiny_model(model_type, "eager")(input_ids=torch.tensor([OLD]), output_attentions=True, use_cache=False)
    for slot, layers in attention_by_row(engine, buffer, OLD, [0, 11, N - 1]):
        for index, weights in enumerate(layers):
            expected = whole.attentions[index][0, :, slot, : slot + 1]
            torch.testing.assert_close(weights.to(expected), expected, rtol=1e-5, atol=1e-6)
    assert buffer.length == N


# -- attribution -------------------------------------------------------------------------------------------------


def target(logits: torch.Tensor) -> torch.Tensor:
    return gap(logits, 17, 44)


def between(old: KVBuffer, new: KVBuffer, share: float) -> KVBuffer:
    """A buffer whose rows lie a share of the way from one context's to the other's."""
    result = old.fork()
    slots = range(old.length)
    rows = []
    for a, b in zip(rows_from(old, slots), rows_from(new, slots), strict=True):
        assert a.keys is not None
        assert a.values is not None
        assert b.keys is not None
        assert b.values is not None
        rows.append(Overwrite(a.layer, torch.lerp(a.keys, b.keys, share), torch.lerp(a.values, b.values, share)))
    result.overwrite(slots, rows)
    return result


def exact_effects(engine: Engine, old: KVBuffer, source: KVBuffer) -> torch.Tensor:
    """[L, H, S] by patching each place alone."""
    found = target_of(probed(engine, old, TOKEN, [Probe(), *each_place(engine, old, range(N - 1))], source))
    return (found[1:] - found[0]).view(len(old), old.keys(0).shape[1], N - 1)


def target_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.stack([target(row) for row in logits])


def rank_correlation(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    return float(spearmanr(estimate.flatten(), exact.flatten()).statistic)


def odd(engine: Engine, old: KVBuffer, new: KVBuffer, share: float, of: Any) -> torch.Tensor:
    """The part of an effect that changes its sign with the patch: a central difference, whose error is cubic in the share."""
    return (of(engine, old, between(old, new, share)) - of(engine, old, between(old, new, -share))) / 2


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attribution_is_the_derivative_of_the_exact_effect(model_type: str) -> None:
    """For small patches exact effects are the attribution's, both kinds; the ranks agree where there is an effect."""
    engine = tiny_engine(model_type)
    old, new = prefilled(engine), prefilled(engine, NEW)
    exact = odd(engine, old, new, 0.01, exact_effects)
    size = float(exact.abs().max())
    for kind in ("rows", "linear"):
        found = odd(engine, old, new, 0.01, lambda *of: getattr(attribute(*of, LAST, target), kind))  # noqa: B023
        # transformers' norms and eager softmax are in float32: 1e-6 of a logit.
        worst = float((found - exact).abs().max())
        assert worst < 2e-3 * size + 2e-6, f"{kind}: off by {worst:.2e}, effects up to {size:.2e}"
        moving = exact.abs() > 1e-2 * size
        correlation = rank_correlation(found[moving], exact[moving])
        assert correlation > 0.99, f"Spearman {correlation:.4f} between attribution and exact effects of small patches"
    one = attribute(engine, old, new, LAST, target)
    torch.testing.assert_close(one.by_slot(), one.rows.sum(dim=(0, 1)))
    assert hooks_of(engine.model) == 0


@pytest.mark.parametrize("model_type", SDPA)
def test_attribution_ranks_whole_patches(model_type: str) -> None:
    """Whole patches in random networks are not small: theory gives no bound, and this one is what a wrong sign would miss."""
    engine = tiny_engine(model_type)
    old, new = prefilled(engine), prefilled(engine, NEW)
    before = contents(old)
    exact = exact_effects(engine, old, new)
    found = attribute(engine, old, new, LAST, target)
    moving = exact.abs() > 0
    recomputed, linear = (rank_correlation(each[moving], exact[moving]) for each in (found.rows, found.linear))
    assert recomputed > 0.5, f"Spearman {recomputed:.3f} with the softmax recomputed, {linear:.3f} without"
    assert all(torch.equal(a, b) for a, b in zip(contents(old), before, strict=True))


def test_what_a_patch_does_to_the_heads_is_exact() -> None:
    """With the head's output itself as the target, the attribution is the exact effect, however large the patch."""
    engine = tiny_engine("llama", num_hidden_layers=1)
    old, new = prefilled(engine), prefilled(engine, NEW)
    site = Site(Place.HEADS, 0)
    from programmable_kv.lab.tools.attribution import _output_changes

    with recorded(engine, old, [site], [N - 1]) as usual:
        engine.compute(old, LAST)
    with engine.graph(old, LAST) as graph:
        changes = _output_changes(graph, new, 0)
    for slot in (0, 4, 5, 12):
        with patched(old, new, [slot]), recorded(engine, old, [site], [N - 1]) as found:
            engine.compute(old, LAST)
        torch.testing.assert_close(changes[:, slot], found[site][0] - usual[site][0], **EXACT)


def test_a_saturated_softmax_hides_an_effect_from_plain_gradients_only() -> None:
    """All attention lies on slot 6; slot 7's new key would take it over. Its gradient is nearly zero, its effect is not.

    The two slots' values differ little, so that the effect is first-order in what the heads read.
    """
    engine = tiny_engine("llama", num_hidden_layers=1)
    old = prefilled(engine)
    with engine.graph(old, LAST) as graph:
        query = graph.last[0].query  # [4, 8]
    # A key that the first query head of each KV head reads with a score of 200, and of -200 in slot 7.
    direction = torch.stack([query[0], query[2]])
    key = (200 * 8**0.5 * direction / direction.norm(dim=-1, keepdim=True) ** 2)[None, :, None]
    value = old.values(0)[:, :, [6]].clone()
    old.overwrite(range(N - 1), [Overwrite(0, torch.zeros_like(old.keys(0)), value.expand(-1, -1, N - 1, -1))])
    old.overwrite([6, 7], [Overwrite(0, torch.cat([key, -key], dim=2), torch.cat([value, value + 0.01], dim=2))])
    source = old.fork()
    source.overwrite([7], [Overwrite(0, 1.01 * key)])
    exact = exact_effects(engine, old, source)[0, :, 7]
    found = attribute(engine, old, source, LAST, target)
    assert float(exact.abs().min()) > 1e-4
    assert float(found.linear[0, :, 7].abs().max()) < 1e-3 * float(exact.abs().min())
    torch.testing.assert_close(found.rows[0, :, 7], exact, rtol=0.05, atol=1e-5)


def test_dropping_gradients_leaves_each_other_path() -> None:
    """In two layers, layer 0's rows keep the path past layer 1: their exact effect with what layer 1 adds held fixed."""
    engine = tiny_engine("llama")
    old, new = prefilled(engine), prefilled(engine, NEW)
    middle, end = Site(Place.RESIDUAL, 1), Site(Place.RESIDUAL, 2)
    with recorded(engine, old, [middle, end], [N - 1]) as clean:
        engine.compute(old, LAST)
    share = 0.01

    def past_layer_1(slot: int, head: int, sign: int) -> float:
        near = between(old, new, sign * share)
        with patched(old, near, [slot], Which((0,), (head,))), recorded(engine, old, [middle], [N - 1]) as found:
            engine.compute(old, LAST)
        with changed(engine, old, end, replaced(found[middle] + clean[end] - clean[middle]), [N - 1]):
            return float(target(engine.compute(old, LAST)[-1]))

    dropped = attribute(engine, old, between(old, new, share), LAST, target, drop=True)
    plain = attribute(engine, old, between(old, new, share), LAST, target)
    for slot, head in ((4, 0), (5, 1), (18, 0)):
        effect = (past_layer_1(slot, head, 1) - past_layer_1(slot, head, -1)) / 2
        assert float(dropped.rows[0, head, slot]) == pytest.approx(abs(effect), rel=0.1, abs=5e-6)
    assert float((dropped.rows[0] - plain.rows[0].abs()).abs().max()) > 1e-5, "layer 1 must matter"
    # The last layer's rows have one path, which no other layer's drop touches.
    torch.testing.assert_close(dropped.rows[-1], plain.rows[-1].abs(), rtol=1e-6, atol=1e-9)
    assert bool((dropped.rows >= 0).all())
    assert hooks_of(engine.model) == 0


def test_heads_are_attributed_too() -> None:
    engine = tiny_engine("llama")
    old, new = prefilled(engine), prefilled(engine, NEW)
    sites = [Site(Place.HEADS, layer) for layer in range(2)]
    share = 0.01
    with recorded(engine, old, sites, [N - 1]) as own:
        engine.compute(old, LAST)
    with recorded(engine, new, sites, [N - 1]) as theirs:
        engine.compute(new, LAST)
    near = {sign: {s: own[s] + sign * share * (theirs[s] - own[s]) for s in sites} for sign in (1, -1)}
    found = attribute(engine, old, new, LAST, target, head_outputs=[near[1][site][0] for site in sites]).heads
    assert found is not None
    for layer, site in enumerate(sites):
        for head in range(4):
            effect = []
            for sign in (1, -1):
                change = of_heads(replaced(near[sign][site][:, [head]]), [head])
                with changed(engine, old, site, change, [N - 1]):
                    effect.append(target(engine.compute(old, LAST)[-1]))
            torch.testing.assert_close(found[layer, head], (effect[0] - effect[1]) / 2, rtol=5e-3, atol=2e-6)


def test_attribution_refuses_what_it_cannot_rank() -> None:
    engine = tiny_engine("minicpm3")
    with pytest.raises(UnsupportedModelError, match="MLA"):
        attribute(engine, prefilled(engine), prefilled(engine, NEW), LAST, target)
    engine = tiny_engine("llama")
    old = prefilled(engine)
    shorter = engine.new_buffer()
    engine.append(shorter, OLD[:5], logits=0)
    with pytest.raises(InvalidArgumentError, match="same slots"):
        attribute(engine, old, shorter, LAST, target)
    with pytest.raises(InvalidArgumentError, match="appended"):
        attribute(engine, old, old.fork(), Rows((3,), (2,), (2,)), target)
    assert hooks_of(engine.model) == 0
    assert engine.model.config._attn_implementation == "sdpa"


# -- read-outs ---------------------------------------------------------------------------------------------------


def test_gaps_divergence_and_flips() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    assert gap(logits, 1, 0).tolist() == [2.0, -2.0]
    probabilities = logits.softmax(-1)
    expected = (probabilities[0] * (probabilities[0] / probabilities[1]).log()).sum()
    torch.testing.assert_close(kl(logits[0], logits[1]), expected)
    assert float(kl(logits, logits + 5.0).abs().max()) < 1e-12, "a constant added to all logits is no change"
    assert flip_rate(logits, logits.flip(0)) == 1.0
    assert flip_rate(logits, torch.stack([logits[0], logits[0]])) == 0.5


def test_recovery_needs_two_right_decisions() -> None:
    scale = Scale(-2.0, 3.0)
    assert [scale.recovery(v) for v in (-2.0, 0.5, 3.0)] == [0.0, 0.5, 1.0]
    assert scale.lost(-2.0) == 1.0
    assert not scale.flipped(-0.1)
    assert scale.recovery(-0.1) == pytest.approx(0.38), "a large recovery may flip nothing"
    for old, new in ((1.0, 3.0), (-3.0, -1.0), (-0.1, 0.2)):
        assert not Scale(old, new).valid
        with pytest.raises(ValueError, match="leave the item out"):
            Scale(old, new).recovery(0.0)


def test_each_domain_is_split_evenly() -> None:
    first, second = split_in_half(["a", "a", "b", "a", "b", "c"])
    assert (first, second) == ([0, 2, 3, 5], [1, 4])


# -- nulls -------------------------------------------------------------------------------------------------------


def test_random_slots_match_the_strata() -> None:
    rng = random.Random(0)
    chosen = (1, 2, 55, 91, 92, 93)
    seen: set[int] = set()
    for _ in range(200):
        drawn = random_slots(chosen, range(100), rng)
        assert len(drawn) == len(set(drawn)) == len(chosen)
        assert not set(drawn) & set(chosen)
        assert sorted(slot // 10 for slot in drawn) == sorted(slot // 10 for slot in chosen)
        seen.update(drawn)
    assert seen == ({*range(10), *range(50, 60), *range(90, 100)} - set(chosen)), (
        "every other slot of a stratum is drawn"
    )
    for wrong in ((200,), (1, 1), tuple(range(10))):
        with pytest.raises(InvalidArgumentError, match="chosen"):
            random_slots(wrong, range(100), rng)


def test_random_heads_are_of_the_same_layers() -> None:
    rng = random.Random(1)
    for _ in range(50):
        drawn = random_heads([(0, 1), (2, 0), (2, 3)], 6, rng)
        assert [layer for layer, _ in drawn] == [0, 2, 2]
        assert not {(0, 1), (2, 0), (2, 3)} & set(drawn)
    with pytest.raises(InvalidArgumentError, match="too few others"):
        random_heads([(0, 0), (0, 1), (0, 2)], 4, rng)


def test_a_random_basis_is_orthonormal_and_lies_where_activations_vary() -> None:
    basis = torch.eye(20)[:, :3]
    drawn = random_basis(basis, 5)
    torch.testing.assert_close(drawn.T @ drawn, torch.eye(3), rtol=0, atol=1e-6)
    assert torch.equal(drawn, random_basis(basis, 5))
    assert not torch.equal(drawn, random_basis(basis, 6))
    covariance = torch.diag(torch.tensor([1.0] * 6 + [0.0] * 14))
    inside = random_basis(basis, 5, covariance=covariance)
    assert float(inside[6:].abs().max()) < 1e-6
    torch.testing.assert_close(inside.T @ inside, torch.eye(3), rtol=0, atol=1e-6)
    overlap = [float((random_basis(basis[:, :1], seed)[0] ** 2).sum()) for seed in range(400)]
    assert sum(overlap) / 400 == pytest.approx(1 / 20, abs=0.01), "every direction is as likely"


def test_gradients_are_of_what_stands_in_the_buffer() -> None:
    engine = tiny_engine("llama")
    old = prefilled(engine)
    with injected(old, [3], [Overwrite(0, values=torch.ones(1, 2, 1, 8, dtype=torch.float64))]):
        with engine.graph(old, LAST) as graph:
            assert float(graph.values[0][0, 0, 3, 0]) == 1.0
            inside = graph.logits[-1].detach()
        torch.testing.assert_close(inside, engine.compute(old, LAST)[-1], **EXACT)
