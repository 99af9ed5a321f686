"""Proves on a loaded model that relocating cached keys is exact, or says why it is not.

The check makes four measurements, none of which needs trained weights:

1. *Probes.* One token is prefilled alone at position 0 and at powers of two. It attends only to itself, so its hidden
   states are the same at every position, in every layer, and a float32 angle at a power of two has no rounding error.
   The rotation is therefore measured to the last bits, and a slightly wrong frequency is detected.
2. *Chunks.* A chunk is prefilled alone at position 0 and at position d, again with nothing before it. The second cache
   must equal the first one relocated by d, keys and values, in every layer.
3. *Counting.* The same chunk follows d other tokens, and the model counts the positions itself. A model that ignores
   the positions passed to it passes the first two, because its chunk never moves; here it moves, and the check fails.
4. *Order.* If nothing in the cache rotates: does the model still distinguish the order of earlier tokens (ALiBi)?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import torch

from programmable_kv.cache.layout import KVLayout, LayerLayout
from programmable_kv.cache.rotation import Rotary
from programmable_kv.verify.candidates import PositionPair, RuleFit, axes_of, best_rule

CachedLayer = dict[str, torch.Tensor]
"""The tensors that one layer caches, by name."""


class Prefill(Protocol):
    """A function that prefills a model with an empty cache."""

    def __call__(self, ids: Sequence[int], positions: torch.Tensor | None, *, padding: int = 0) -> list[CachedLayer]:
        """The tensors that each layer caches. `positions` is [T], [A, T], or None to let the model count by itself.

        The first `padding` ids are padding: nothing attends to them.
        """


class PositionEncoding(StrEnum):
    """How a model encodes positions, as far as its cache shows."""

    ROTARY = "rotary"
    LEARNED = "in the hidden states"
    NONE_CACHED = "none cached"
    """ALiBi or no encoding at all: nothing in the cache depends on a position."""


class Verdict(StrEnum):
    EXACT = "exact"
    WITHIN = "exact within a regime"
    ATTENTION_ONLY = "attention layers only"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class RelocationProof:
    """The result of the check: what is exact, with which layout, and the largest error."""

    verdict: Verdict
    layout: KVLayout
    worst: float
    """the largest ratio of an error to its tolerance; at most 1 when exact"""
    reason: str = ""
    encoding: PositionEncoding = PositionEncoding.ROTARY
    within: int | None = None
    """the bound on positions below which it is exact; None: exact at all positions of the model"""
    states: tuple[int, ...] = ()
    """indices of layers with a recurrent state, which must be computed again by a scan over the tokens"""
    tells_order: bool = True
    """whether the second layer depends on the order of earlier tokens; measured only if nothing in the cache rotates"""

    @property
    def exact(self) -> bool:
        return self.verdict in (Verdict.EXACT, Verdict.WITHIN)


_CHUNK = 13
_DISPLACEMENTS = (1, 17, 200)
_PROBES = 2
_LARGEST_PROBE = 2**16
_COUNTED = 17


def probe_tolerance(dtype: torch.dtype) -> float:
    """The largest allowed error of one token's relocated keys, relative to their norm.

    At position 0 the rotation is the identity, and at a power of two the float32 product p f is exact. At most eight
    roundings of half a unit remain: the key as cached at either position, cos and sin (in float32, then in the model's
    dtype), two products and their sum, and our own result.
    """
    return 4 * (2.0**-23 + torch.finfo(dtype).eps)


def tolerance(model_dtype: torch.dtype, frequencies: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The largest allowed error of a correctly relocated chunk, relative to a key's norm, for each rotary pair [R / 2].

    The model computes an angle p f in float32, whatever its own dtype: the product is rounded once, an error of
    p f 2^-24 at each of the two positions, and cos and sin are rounded too. Keys in a narrower dtype are rounded when
    they are cached, at both positions and after the rotation. The hidden states behind the two caches are equal in
    exact arithmetic but pass through layers whose attention used angles with those errors, hence the margin of 32.
    In a narrow dtype a test with that margin proves little; there the probes, which need no margin, prove the rotation.
    """
    angle = frequencies * (low + high) * 2.0**-24
    return 32 * (angle + 4 * 2.0**-24 + 4 * torch.finfo(model_dtype).eps)


def prove_relocation(layout: KVLayout, prefill: Prefill, vocabulary: int, dtype: torch.dtype) -> RelocationProof:
    """Run the check on a model through `prefill`. The proof's layout has the rotation found for each layer.

    Raises:
        FloatingPointError: the model computes NaN or infinity, so nothing can be compared.
    """
    return _Check(layout, prefill, vocabulary, dtype).run()


class _Refused(Exception):
    """Ends a check; caught in `run`."""


class _Check:
    def __init__(self, layout: KVLayout, prefill: Prefill, vocabulary: int, dtype: torch.dtype) -> None:
        self.layout, self.prefill, self.dtype = layout, prefill, dtype
        self.ids = [(7 + 31 * i) % vocabulary for i in range(_CHUNK)]
        bounds = [layout.position_limit, layout.regime.within if layout.regime else None]
        self.limit = min((bound for bound in bounds if bound), default=_LARGEST_PROBE + _CHUNK)
        self.names: list[tuple[str, ...]] = []
        self.states: tuple[int, ...] = ()
        self.worst = 0.0
        self.encoding = PositionEncoding.ROTARY
        self.tells_order = True
        self.note = ""

    def run(self) -> RelocationProof:
        try:
            if self.limit < _CHUNK + _COUNTED:
                raise _Refused(f"{self.limit} positions are too few for the check")
            here = self._chunk(0)
            self._sort_tensors(here)
            self._probe()
            self._move_chunks(here)
            self._let_count(here)
            if self.encoding is PositionEncoding.NONE_CACHED:
                self._swap(here)
        except _Refused as refusal:
            return self._proof(Verdict.REFUSED, str(refusal))
        verdict, reason, within = Verdict.EXACT, self.note, None
        if self.states:
            verdict = Verdict.ATTENTION_ONLY
            few = "layer {} has" if len(self.states) == 1 else "layers {} have"
            reason = f"{few.format(_listed(self.states))} a recurrent state that must be recomputed"
        elif self.layout.regime is not None and self._regime_matters(here):
            verdict, within = Verdict.WITHIN, self.layout.regime.within
            reason = f"{self.layout.regime.name}: positions below {within} only"
        return replace(self._proof(verdict, reason), within=within)

    def _proof(self, verdict: Verdict, reason: str) -> RelocationProof:
        return RelocationProof(
            verdict, self.layout, self.worst, reason, self.encoding, None, self.states, self.tells_order
        )

    def _chunk(self, start: int) -> list[CachedLayer]:
        return self.prefill(self.ids, torch.arange(start, start + _CHUNK))

    # -- what is there -----------------------------------------------------------------------------------------

    def _sort_tensors(self, here: list[CachedLayer]) -> None:
        """Distinguish tensors with one row per token from states, by their shape."""
        if not all(bool(torch.isfinite(tensor).all()) for layer in here for tensor in layer.values()):
            raise FloatingPointError("it caches NaN or infinity")
        if len(here) != len(self.layout.layers):
            raise _Refused(f"it caches {len(here)} layers, but its configuration names {len(self.layout.layers)}")
        states = []
        for index, layer in enumerate(here):
            names = tuple(n for n, tensor in layer.items() if "." not in n and tensor.shape[-2] == _CHUNK)
            self.names.append(names)
            if set(layer) - set(names):
                states.append(index)
        self.states = tuple(states)
        if not any(self.names):
            rows = {tensor.shape[-2] for layer in here for name, tensor in layer.items() if name == "keys"}
            raise _Refused(
                f"it caches {min(rows)} rows for {_CHUNK} tokens, so its rows cannot be assigned to tokens"
                if rows
                else "no layer caches anything for each token: its whole past is a state"
            )

    # -- one token, wherever it stands -------------------------------------------------------------------------

    def _probe(self) -> None:
        """Find how each layer's tensors rotate, from single tokens at powers of two."""
        largest = max(2**k for k in range(17) if 2**k < self.limit)
        steps = sorted({1, largest})
        tokens = self.ids[:_PROBES]
        before = [self.prefill([token], torch.tensor([0])) for token in tokens]
        after = [[self.prefill([token], torch.tensor([step])) for token in tokens] for step in steps]
        layers = []
        for index, layer in enumerate(self.layout.layers):
            rules: dict[str, Rotary | None] = {}
            failed: dict[str, RuleFit] = {}
            for name in self.names[index]:
                pairs = [
                    PositionPair(torch.tensor([step]), before[n][index][name], after[s][n][index][name])
                    for s, step in enumerate(steps)
                    for n in range(len(tokens))
                ]
                found = self._rule(name, layer, pairs)
                rules[name] = found.rule
                if not found.error <= probe_tolerance(self.dtype):
                    failed[name] = found
            self._refuse_failed(index, failed)
            others = tuple((name, rule) for name, rule in rules.items() if name != "keys" and rule is not None)
            layers.append(replace(layer, rotary=rules.get("keys"), others=others))
        self.layout = replace(self.layout, layers=tuple(layers))
        if not any(layer.rotary or layer.others for layer in layers):
            self.encoding = PositionEncoding.NONE_CACHED
        elif self.layout.axes > 1:
            self._probe_axes(tokens[0], before[0], largest)

    def _rule(self, name: str, layer: LayerLayout, pairs: list[PositionPair]) -> RuleFit:
        # Values do not rotate, except with MLA, which caches its rotary keys as values.
        expected = None if name == "values" else layer.rotary
        tables = self.layout.tables if layer.rotary is None else (layer.rotary, *self.layout.tables)
        found = best_rule(expected, tables, pairs, probe_tolerance(self.dtype))
        self.worst = max(self.worst, found.error / probe_tolerance(self.dtype))
        return found

    def _refuse_failed(self, index: int, failed: dict[str, RuleFit]) -> None:
        if not failed:
            return
        name, found = next(iter(failed.items()))
        tried = "a copy" if found.rule is None else "the closest of the rotations tried"
        off = f"{tried} is off by {found.error:.2e} of their norm (tolerance {probe_tolerance(self.dtype):.2e})"
        if set(failed) == set(self.names[index]):
            self.encoding = PositionEncoding.LEARNED
            raise _Refused(
                f"everything that layer {index} caches of a single token depends on its position ({name}: {off})"
            )
        raise _Refused(f"in layer {index} the {name} of a single token depend on its position, and {off}")

    def _probe_axes(self, token: int, before: list[CachedLayer], largest: int) -> None:
        """Find the position axis of each frequency: move along each axis alone, then along all by different steps."""
        axes = self.layout.axes
        unit = torch.eye(axes, dtype=torch.long)[:, :, None] * largest
        mixed = torch.tensor([[max(largest >> axis, 1)] for axis in range(axes)])
        self.note = "moved along all axes at once; which axis rotates which channels could not be determined"
        try:
            *alone, together = [self.prefill([token], offsets) for offsets in (*unit, mixed)]
        except (ValueError, RuntimeError, IndexError, TypeError):
            return  # the model has M-RoPE sections, but does not accept positions with several axes
        allowed = probe_tolerance(self.dtype)
        layers = []
        for index, layer in enumerate(self.layout.layers):
            rule = layer.rotary
            if rule is not None:
                first = before[index]["keys"]
                rule = axes_of(
                    rule, [PositionPair(unit[a], first, alone[a][index]["keys"]) for a in range(axes)], allowed
                )
                error = float(PositionPair(mixed, first, together[index]["keys"]).error(rule).max()) if rule else 0.0
                self.worst = max(self.worst, error / allowed)
                if rule is None or not error <= allowed:
                    return
            layers.append(replace(layer, rotary=rule))
        self.layout, self.note = replace(self.layout, layers=tuple(layers)), ""

    # -- several tokens ----------------------------------------------------------------------------------------

    def _move_chunks(self, here: list[CachedLayer]) -> None:
        for displacement in _DISPLACEMENTS:
            if displacement + _CHUNK <= self.limit:
                there = self._chunk(displacement)
                for index, layer in enumerate(self.layout.layers):
                    allowed = self._allowed(layer, displacement)
                    for name in self.names[index]:
                        pair = PositionPair(torch.full((_CHUNK,), displacement), here[index][name], there[index][name])
                        self._compare(index, name, layer, pair, allowed, f"moved by {displacement} positions")

    def _compare(
        self, index: int, name: str, layer: LayerLayout, pair: PositionPair, allowed: float, what: str
    ) -> None:
        error = pair.error(rule_of(layer, name))
        largest = float(error.max())
        self.worst = max(self.worst, largest / allowed)
        if not largest <= allowed:
            channel = int(error.amax(dim=(0, 1, 2)).argmax())
            raise _Refused(
                f"in layer {index} the {name} of a chunk {what} differ from those computed there by {largest:.2e} of "
                f"their norm in channel {channel} (tolerance {allowed:.2e})"
            )

    def _allowed(self, layer: LayerLayout, displacement: int) -> float:
        """The tolerance of a layer: the worst rotary pair's, because hidden states spread its error to all channels."""
        rules = [rule for each in self.layout.layers for rule in (each.rotary, *dict(each.others).values()) if rule]
        frequencies = torch.tensor([f for rule in rules for f in rule.frequencies] or [1.0], dtype=torch.float64)
        return float(tolerance(self.dtype, frequencies, _CHUNK, _CHUNK + displacement).max())

    def _regime_matters(self, here: list[CachedLayer]) -> bool:
        """Whether relocating a chunk across the bound is wrong; assumed to be if it cannot be measured."""
        regime, limit = self.layout.regime, self.layout.position_limit
        assert regime is not None
        if not regime.changes_frequencies or (limit is not None and regime.within + _CHUNK > limit):
            return True
        there = self._chunk(regime.within)
        offsets = torch.full((_CHUNK,), regime.within)
        return any(
            float(PositionPair(offsets, here[index][name], there[index][name]).error(rule_of(layer, name)).max())
            > self._allowed(layer, regime.within)
            for index, layer in enumerate(self.layout.layers)
            for name in self.names[index]
        )

    # -- positions that the model counts ----------------------------------------------------------------------------

    def _let_count(self, here: list[CachedLayer]) -> None:
        """Let the model count positions itself, after other tokens, and check that its chunk moves as it should.

        Only the first caching layer is compared, since its input does not depend on earlier tokens. If there are layers
        with states, the other tokens are padding and all layers are compared.
        """
        filler = [self.ids[-1]] * _COUNTED
        whole = self.prefill([*filler, *self.ids], None, padding=_COUNTED if self.states else 0)
        if self.states and not all(bool(torch.isfinite(t).all()) for layer in whole for t in layer.values()):
            # In some models a row of padding attends to nothing, and the softmax over nothing is NaN.
            raise FloatingPointError("padding makes it compute NaN, so its own counting of positions cannot be checked")
        first = next(index for index, names in enumerate(self.names) if names)
        checked = range(len(here)) if self.states else (first,)
        for index in checked:
            layer = self.layout.layers[index]
            for name in self.names[index]:
                there = whole[index][name][..., _COUNTED:, :]
                pair = PositionPair(torch.full((_CHUNK,), _COUNTED), here[index][name], there)
                allowed = self._allowed(layer, _COUNTED)
                if not float(pair.error(rule_of(layer, name)).max()) <= allowed:
                    self.encoding = PositionEncoding.LEARNED
                self._compare(
                    index, name, layer, pair, allowed, f"placed after {_COUNTED} others by the model's own count"
                )

    def _swap(self, here: list[CachedLayer]) -> None:
        """Check whether layer 1 changes when two earlier tokens are swapped."""
        if len(self.names) < 2 or not self.names[1]:
            return
        name = self.names[1][-1]
        swapped = self.prefill([self.ids[1], self.ids[0], *self.ids[2:]], torch.arange(_CHUNK))
        last = [layers[1][name][..., -1:, :] for layers in (here, swapped)]
        error = float(PositionPair(torch.tensor([0]), *last).error(None).max())
        self.tells_order = error > probe_tolerance(self.dtype)


def rule_of(layer: LayerLayout, name: str) -> Rotary | None:
    """How a layer's cached tensor of that name rotates; None if it does not."""
    return layer.rotary if name == "keys" else dict(layer.others).get(name)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
