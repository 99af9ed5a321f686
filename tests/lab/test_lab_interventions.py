"""Every intervention equals an exact counterpart in float64, and nothing stays changed, even after errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from conftest import tiny_engine, tiny_model
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.masks import visible
from programmable_kv.cache.modules import DecoderModules
from programmable_kv.cache.overwrite import Overwrite
from programmable_kv.cache.transformers_api import GROUPED_SDPA, register_attention
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import CacheBufferError, InvalidArgumentError, UnsupportedModelError
from programmable_kv.lab.tools.changes import ablated, added, interchanged, of_heads, projected_out, replaced
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.knockout import Knockout, knocked_out
from programmable_kv.lab.tools.kv import Which, injected, mean_ablated, patched, rows_from, swapped
from programmable_kv.lab.tools.sites import Place, Site, changed, recorded

N = 20
OLD = tuple((7 + 31 * i) % 500 for i in range(N))
NEW = (*OLD[:4], 401, 402, *OLD[6:])
"""another text of the same length: two tokens near the beginning differ"""
LAST = Rows((OLD[-1],), (N - 1,), (N - 1,))
EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROTATED = {"rtol": 1e-6, "atol": 1e-6}
"""models compute rotary angles in float32, so rotations agree with them only to float32"""
FAMILIES = ("llama", "gemma3_text", "gpt_neox", "minicpm3")
ATTENTIONS = ("sdpa", "eager", GROUPED_SDPA)


def prefilled(engine: Engine, ids: tuple[int, ...] = OLD) -> KVBuffer:
    """A buffer with all tokens except the last one."""
    buffer = engine.new_buffer()
    engine.append(buffer, ids[:-1], logits=0)
    return buffer


def engine_of(model_type: str, attention: str = "sdpa") -> Engine:
    register_attention()
    return tiny_engine(model_type, "eager" if model_type == "gemma2" else attention)


def rows(slots: range | list[int], ids: tuple[int, ...] = OLD) -> Rows:
    return Rows(tuple(ids[slot] for slot in slots), tuple(slots), tuple(slots))


def contents(buffer: KVBuffer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in buffer.tensors().values()]


def assert_same(buffer: KVBuffer, before: list[torch.Tensor]) -> None:
    after = contents(buffer)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "the cache was changed"


def hooks_of(model: Any) -> int:
    """This package's hooks. (transformers leaves some of its own behind when attention weights are asked for.)"""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__module__.startswith("programmable_kv") for hook in hooks)


# -- the cache ---------------------------------------------------------------------------------------------------


def test_patching_all_is_the_other_prefill_and_patching_nothing_changes_nothing(model_type: str) -> None:
    engine = engine_of(model_type)
    old, new = prefilled(engine), prefilled(engine, NEW)
    before = contents(old)
    stale, full = engine.compute(old.fork(), LAST), engine.compute(new.fork(), LAST)
    assert float((stale - full).abs().max()) > 1e-3, "the two texts must differ in what follows"
    with patched(old, new, range(N - 1)):
        torch.testing.assert_close(engine.compute(old, LAST), full, **EXACT)
    with patched(old, old, range(N - 1)):
        torch.testing.assert_close(engine.compute(old, LAST), stale, **EXACT)
    # What comes before the change is the same in both texts, so patching it changes nothing either.
    with patched(old, new, range(4)):
        torch.testing.assert_close(engine.compute(old, LAST), stale, **EXACT)
    assert_same(old, before)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_patch_by_layer_and_head_changes_just_that(model_type: str) -> None:
    engine = engine_of(model_type)
    old, new = prefilled(engine), prefilled(engine, NEW)
    head = old.keys(0).shape[1] - 1
    with patched(old, new, [5, 9], Which(layers=(1,), heads=(head,), values=False)):
        for layer in range(len(old)):
            for ours, theirs, stale in (
                (old.keys(layer), new.keys(layer), prefilled(engine).keys(layer)),
                (old.values(layer), old.values(layer), prefilled(engine).values(layer)),
            ):
                expected = stale.clone()
                if layer == 1 and theirs is not ours:
                    expected[:, head, [5, 9]] = theirs[:, head, [5, 9]]
                assert torch.equal(ours, expected), layer
    # All heads and all layers one after the other are all at once.
    with taken_back(old):
        for layer in range(len(old)):
            for each in range(head + 1):
                old.overwrite([5, 9], rows_from(new, [5, 9], Which((layer,), (each,))))
        one_by_one = contents(old)
    with patched(old, new, [5, 9]):
        assert_same(old, one_by_one)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_patching_the_suffix_is_recomputing_it_after_the_change(model_type: str) -> None:
    engine = engine_of(model_type)
    old, new = prefilled(engine), prefilled(engine, NEW)
    with patched(old, new, range(4, N - 1)):
        oracle = engine.compute(old, LAST)
    with taken_back(old):
        torch.testing.assert_close(engine.compute(old, rows(range(4, N), NEW)), oracle, **EXACT)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "minicpm3"])
def test_rows_from_other_positions_are_rotated(model_type: str) -> None:
    """A token alone at position 3 of one buffer and 11 of another: the patch equals the token computed there."""
    engine = engine_of(model_type)
    source, target = engine.new_buffer(), engine.new_buffer()
    engine.compute(source, Rows((9,), (0,), (3,)))
    engine.compute(target, Rows((8,), (0,), (11,)))
    expected = engine.new_buffer()
    engine.compute(expected, Rows((9,), (0,), (11,)))
    with pytest.raises(InvalidArgumentError, match="require_relocation"), patched(target, source, [0]):
        pass
    with patched(target, source, [0], layout=engine.require_relocation()):
        for layer in range(len(target)):
            torch.testing.assert_close(target.keys(layer), expected.keys(layer), **ROTATED)
            torch.testing.assert_close(target.values(layer), expected.values(layer), **ROTATED)


def test_a_swap_of_two_tokens_that_read_nothing_is_the_swapped_text() -> None:
    """With all attention between tokens knocked out, a token's keys and values depend on it and its position only."""
    engine = engine_of("llama")
    alone = [Knockout((q,), tuple(range(q))) for q in range(1, N)]

    def isolated(ids: tuple[int, ...]) -> KVBuffer:
        buffer = engine.new_buffer()
        with knocked_out(engine, buffer, *alone):
            engine.compute(buffer, rows(range(N), ids), logits=0)
            return buffer.fork()

    buffer = isolated(OLD)
    before = contents(buffer)
    changed_places = list(OLD)
    changed_places[3], changed_places[8] = OLD[8], OLD[3]
    expected = isolated(tuple(changed_places))
    with swapped(buffer, [3], [8], layout=engine.require_relocation()):
        for layer in range(len(buffer)):
            torch.testing.assert_close(buffer.keys(layer), expected.keys(layer), **ROTATED)
            torch.testing.assert_close(buffer.values(layer), expected.values(layer), **ROTATED)
    assert_same(buffer, before)


def test_a_mean_ablation_is_the_mean() -> None:
    engine = engine_of("llama")
    old, new = prefilled(engine), prefilled(engine, NEW)
    expected = (old.values(1)[:, :, [7]] + new.values(1)[:, :, [7]]) / 2
    with mean_ablated(old, [old.fork(), new], [7], Which(layers=(1,), keys=False)):
        torch.testing.assert_close(old.values(1)[:, :, [7]], expected)
    with pytest.raises(InvalidArgumentError, match="mean"), mean_ablated(old, [], [7]):
        pass


@pytest.mark.parametrize(
    ("slots", "row", "error"),
    [
        ([N], Overwrite(0), "among"),
        ([3, 3], Overwrite(0), "without repeats"),
        ([], Overwrite(0), "among"),
        ([3], Overwrite(9), "layer 9 does not exist"),
        ([3], Overwrite(0, torch.zeros(1, 1, 1, 8)), "do not fit"),
        ([3], Overwrite(0, torch.zeros(1, 1, 1, 8), heads=(5,)), "do not fit"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(slots: list[int], row: Overwrite, error: str) -> None:
    engine = engine_of("llama")
    buffer = prefilled(engine)
    before = contents(buffer)
    fitting = Overwrite(0, torch.zeros(1, 2, max(1, len(slots)), 8))
    with pytest.raises(CacheBufferError, match=error), injected(buffer, slots, [fitting, row]):
        pass
    assert_same(buffer, before)


# -- knock-out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_knockout_of_all_later_rows_removes_the_span(model_type: str, attention: str) -> None:
    """The suffix computed with the span knocked out equals a prefill in which a mask made by hand hides the span."""
    if model_type == "gemma2" and attention != "eager":
        pytest.skip("transformers implements this model's soft-capped scores in eager attention only")
    engine = engine_of(model_type, attention)
    span, suffix = range(5, 8), range(8, N)
    expected = masked_prefill(model_type, attention, [(suffix, span)])
    buffer = prefilled(engine)
    with knocked_out(engine, buffer, Knockout(tuple(suffix), tuple(span))):
        found = engine.compute(buffer, rows(suffix), logits=len(suffix))
    torch.testing.assert_close(found, expected[8:], **EXACT)
    plain = engine.compute(buffer.fork(), rows(suffix), logits=len(suffix))
    assert float((found - plain).abs().max()) > 1e-3, "the span must matter"


def masked_prefill(model_type: str, attention: str, hidden: list[tuple[range, range]]) -> Any:
    """[N, vocabulary] logits of transformers' own prefill with masks made here; its eager softmax is in float32."""
    model = tiny_model(model_type, "eager" if attention == "eager" else "sdpa")
    layout = Engine(model).layout
    places = torch.arange(N)
    masks = {}
    for reach, window in layout.reaches:
        seen = visible(places, places, reach, window)
        for queries, keys in hidden:
            seen[queries.start : queries.stop, keys.start : keys.stop] = False
        bias = torch.zeros(1, 1, N, N, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
        masks[reach.value] = bias if attention == "eager" else seen[None, None]
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    with torch.no_grad():
        return model(input_ids=torch.tensor([OLD]), attention_mask=mask, use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_knockout_in_a_band_of_layers_is_a_patch_of_the_lower_layers(attention: str) -> None:
    """If only the last layer is blocked, its last row attends to the other rows, with renormalised weights."""
    engine = engine_of("llama", attention)
    buffer = prefilled(engine)
    last = len(buffer) - 1
    with recorded(engine, buffer, [Site(Place.HEADS, last)], [N - 1]) as usual:
        engine.compute(buffer, LAST)
    weights = engine.attention_weights(buffer, LAST)[last].to(torch.float64)
    with (
        knocked_out(engine, buffer, Knockout((N - 1,), (4, 5), layers=(last,), heads=(0, 2))),
        recorded(engine, buffer, [Site(Place.HEADS, last)], [N - 1]) as found,
    ):
        engine.compute(buffer, LAST)
        values = buffer.values(last)[0].repeat_interleave(2, dim=0)
    kept = weights.clone()
    kept[[0, 2], 4] = kept[[0, 2], 5] = 0
    kept = kept / kept.sum(dim=-1, keepdim=True)
    expected = (kept[:, None] @ values)[:, 0]
    site = Site(Place.HEADS, last)
    # Eager attention rounds its weights to float32.
    torch.testing.assert_close(
        found[site][0], expected, **(EXACT if attention == "sdpa" else {"rtol": 1e-6, "atol": 1e-6})
    )
    torch.testing.assert_close(found[site][0, [1, 3]], usual[site][0, [1, 3]], **EXACT)


def test_a_row_that_would_see_nothing_is_refused() -> None:
    engine = engine_of("llama")
    buffer = prefilled(engine)
    before = contents(buffer)
    with (
        pytest.raises(InvalidArgumentError, match="attend to nothing in layer 0"),
        knocked_out(engine, buffer, Knockout((N - 1,), tuple(range(N)))),
    ):
        engine.compute(buffer, LAST)
    assert_same(buffer, before)
    with (
        pytest.raises(InvalidArgumentError, match="there are 2 layers"),
        knocked_out(engine, buffer, Knockout((N - 1,), (1,), layers=(2,))),
    ):
        pass


# -- activations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_patching_the_residual_of_a_row_is_the_other_row_from_there_on(model_type: str) -> None:
    """With one cache and the last row's residual of another token before layer 0, the row is that token's."""
    engine = engine_of(model_type)
    buffer = prefilled(engine)
    other = Rows((77,), (N - 1,), (N - 1,))
    count = len(buffer)
    sites = [Site(Place.RESIDUAL, layer) for layer in range(count + 1)]
    with recorded(engine, buffer, sites, [N - 1]) as theirs:
        expected = engine.compute(buffer, other)
    with recorded(engine, buffer, sites, [N - 1]) as own:
        usual = engine.compute(buffer, LAST)
    # Before layer 0 (all of the row) and before the final norm (all that the head reads) it is the other row.
    for layer in (0, count):
        with changed(engine, buffer, sites[layer], replaced(theirs[sites[layer]]), [N - 1]):
            torch.testing.assert_close(engine.compute(buffer, LAST), expected, **EXACT)
    for site in sites:
        with changed(engine, buffer, site, replaced(own[site]), [N - 1]):
            torch.testing.assert_close(engine.compute(buffer, LAST), usual, **EXACT)


@pytest.mark.parametrize("model_type", [*FAMILIES, "gemma2"])
def test_patching_all_heads_is_patching_the_attentions_output(model_type: str) -> None:
    engine = engine_of(model_type)
    old, new = prefilled(engine), prefilled(engine, NEW)
    for layer in range(len(old)):
        sites = [Site(Place.HEADS, layer), Site(Place.ATTENTION, layer)]
        with recorded(engine, new, sites, [N - 1]) as theirs:
            engine.compute(new, LAST)
        assert theirs[sites[0]].shape[:2] == (1, 4)
        found = []
        for site in sites:
            with changed(engine, old, site, replaced(theirs[site]), [N - 1]):
                found.append(engine.compute(old, LAST))
        torch.testing.assert_close(found[0], found[1], **EXACT)
        # Head by head, nested, is all at once.
        with taken_back(old):
            contexts = [
                changed(engine, old, sites[0], of_heads(replaced(theirs[sites[0]][:, [head]]), [head]), [N - 1])
                for head in range(4)
            ]
            torch.testing.assert_close(nested(contexts, lambda: engine.compute(old, LAST)), found[0], **EXACT)


def nested(contexts: list[AbstractContextManager[Any]], do: Callable[[], Any]) -> Any:
    if not contexts:
        return do()
    with contexts[0]:
        return nested(contexts[1:], do)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_patching_the_residual_of_the_suffix_patches_its_keys_and_values(model_type: str) -> None:
    """The residual of every row before layer 1, from the other text: from layer 1 on the cache is the other text's."""
    engine = engine_of(model_type)
    old, new = prefilled(engine), prefilled(engine, NEW)
    site = Site(Place.RESIDUAL, 1)
    with recorded(engine, new, [site], range(N)) as theirs:
        expected = engine.compute(new, rows(range(N), NEW), logits=N)
        after = [(new.keys(i).clone(), new.values(i).clone()) for i in range(len(new))]
    with changed(engine, old, site, replaced(theirs[site]), range(N)):
        found = engine.compute(old, rows(range(N)), logits=N, chunk=7)
        for layer in range(1, len(old)):
            torch.testing.assert_close(old.keys(layer), after[layer][0], **EXACT)
            torch.testing.assert_close(old.values(layer), after[layer][1], **EXACT)
    torch.testing.assert_close(found[-1], expected[-1], **EXACT)


def test_directions_and_subspaces() -> None:
    engine = engine_of("llama")
    buffer = prefilled(engine)
    site = Site(Place.RESIDUAL, 1)
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(32, 3, generator=generator, dtype=torch.float64)).Q
    other = torch.randn(1, 32, generator=generator, dtype=torch.float64)
    with recorded(engine, buffer, [site], [N - 1]) as found:
        engine.compute(buffer, LAST)
    own = found[site]
    along = own @ basis @ basis.T

    def seen_after(change: Any) -> torch.Tensor:
        with (
            changed(engine, buffer, site, change, [N - 1]),
            recorded(engine, buffer, [site], [N - 1]) as after,
        ):
            engine.compute(buffer, LAST)
        return after[site]

    direction = basis[:, 0]
    torch.testing.assert_close(seen_after(added(direction, 2.5)), own + 2.5 * direction)
    torch.testing.assert_close(seen_after(projected_out(basis)) @ basis, torch.zeros(1, 3, dtype=torch.float64))
    torch.testing.assert_close(seen_after(projected_out(basis)), own - along)
    torch.testing.assert_close(seen_after(projected_out(basis, other[0])) @ basis, other @ basis)
    swapped_in = seen_after(interchanged(other, basis))
    torch.testing.assert_close(swapped_in @ basis, other @ basis)
    torch.testing.assert_close(swapped_in - swapped_in @ basis @ basis.T, own - along)
    torch.testing.assert_close(seen_after(interchanged(own, basis)), own)
    torch.testing.assert_close(seen_after(interchanged(other, torch.eye(32, dtype=torch.float64))), other)
    torch.testing.assert_close(seen_after(ablated(torch.stack([own[0], other[0]]))), (own + other) / 2)
    for wrong in (2 * basis, basis[:, 0]):
        with pytest.raises(InvalidArgumentError, match="basis"):
            interchanged(other, wrong)


# -- always restored ---------------------------------------------------------------------------------------------


def interventions(engine: Engine, buffer: KVBuffer, other: KVBuffer) -> dict[str, AbstractContextManager[Any]]:
    nothing = replaced(torch.zeros(1, 32, dtype=torch.float64))
    heads = replaced(torch.zeros(1, 4, 8, dtype=torch.float64))
    return {
        "patch": patched(buffer, other, range(3, 9)),
        "swap": swapped(buffer, [3], [9], layout=engine.require_relocation()),
        "mean": mean_ablated(buffer, [buffer, other], [5]),
        "knock-out": knocked_out(engine, buffer, Knockout((N - 1,), (4,))),
        "residual": changed(engine, buffer, Site(Place.RESIDUAL, 1), nothing, [N - 1]),
        "heads": changed(engine, buffer, Site(Place.HEADS, 1), heads, [N - 1]),
        "attention": changed(engine, buffer, Site(Place.ATTENTION, 0), nothing, [N - 1]),
        "record": recorded(engine, buffer, [Site(Place.RESIDUAL, 2), Site(Place.HEADS, 0)], [N - 1]),
    }


class Broken(Exception):
    pass


def fail_after(engine: Engine, buffer: KVBuffer, *, computed: bool) -> None:
    if computed:
        engine.compute(buffer, rows(range(10, N)))
    raise Broken


@pytest.mark.parametrize(
    "name", list(interventions(*(lambda e: (e, prefilled(e), prefilled(e, NEW)))(engine_of("llama"))))
)
def test_nothing_stays_changed(name: str) -> None:
    """After the block, after an error in it (before or after a forward), and for other buffers during it."""
    engine = engine_of("llama")
    buffer, other = prefilled(engine), prefilled(engine, NEW)
    before, others = contents(buffer), contents(other)
    stale = engine.compute(buffer.fork(), LAST)
    stranger = prefilled(engine)

    def untouched() -> None:
        assert hooks_of(engine.model) == 0
        assert_same(buffer, before)
        assert_same(other, others)
        assert not buffer._history, "a mark was left behind"
        with taken_back(buffer):
            assert torch.equal(engine.compute(buffer, LAST), stale)

    with interventions(engine, buffer, other)[name]:
        inside = engine.compute(buffer, LAST)
        assert torch.equal(engine.compute(stranger.fork(), LAST), stale), "another buffer was intervened in"
    assert name == "record" or float((inside - stale).abs().max()) > 1e-6, "the intervention did nothing"
    untouched()
    for computed in (False, True):
        with pytest.raises(Broken), interventions(engine, buffer, other)[name]:
            fail_after(engine, buffer, computed=computed)
        untouched()


def test_an_error_in_a_change_leaves_nothing_behind() -> None:
    engine = engine_of("llama")
    buffer = prefilled(engine)
    before = contents(buffer)

    def broken(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        raise Broken

    for place in Place:
        with pytest.raises(Broken), changed(engine, buffer, Site(place, 1), broken, [N - 1]):
            engine.compute(buffer, rows(range(10, N)))
        assert hooks_of(engine.model) == 0
        assert_same(buffer, before)
    with (
        pytest.raises(InvalidArgumentError, match="must keep the shape"),
        changed(engine, buffer, Site(Place.RESIDUAL, 1), lambda rows, _: rows[:, :3], [N - 1]),
    ):
        engine.compute(buffer, LAST)


def test_an_intervention_that_was_never_reached_is_an_error() -> None:
    engine = engine_of("llama")
    buffer = prefilled(engine)
    site = Site(Place.RESIDUAL, 1)
    for context in (
        changed(engine, buffer, site, added(torch.ones(32)), [3, N - 1]),
        knocked_out(engine, buffer, Knockout((3, N - 1), (1,))),
    ):
        with pytest.raises(InvalidArgumentError, match="never reached for slots"), context:
            engine.compute(buffer, LAST)
    for layer, place in ((3, Place.RESIDUAL), (2, Place.HEADS), (-1, Place.ATTENTION)):
        with (
            pytest.raises(InvalidArgumentError, match="has 2 layers"),
            changed(engine, buffer, Site(place, layer), added(torch.ones(32)), [3]),
        ):
            pass


def test_modules_are_found_or_refused(model_type: str) -> None:
    model = tiny_model(model_type)
    found = DecoderModules.of(model)
    assert len(found.layers) == len(found.attentions) == len(found.projections) == model.config.num_hidden_layers
    assert all(getattr(each, "layer_idx", None) == index for index, each in enumerate(found.attentions))


def test_a_model_whose_parts_have_other_names_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    decoder = model.get_decoder()
    decoder.closing = decoder.norm
    kept = decoder._modules.pop("norm")
    try:
        with pytest.raises(UnsupportedModelError, match="cannot be intervened in"):
            DecoderModules.of(model)
    finally:
        decoder._modules["norm"] = kept
        del decoder._modules["closing"]
