"""The one place that runs the transformer.

Everything a notebook does to a cache comes down to one primitive: *compute these rows*. Rows are tokens with a slot
and a position; they may be appended, lie in the middle, or both at once. A single forward writes their keys and
values into the buffer layer by layer, so a refreshed field is already in place, in every layer, when an erratum
or a question in the same forward attends to it. Fusing them costs one sweep over the weights instead of three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from programmable_kv.account import Meter
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.masks import attention_masks
from programmable_kv.cache.transformers_api import (
    Cache,
    DynamicCache,
    cache_that_drops_nothing,
    cached_tensors,
    fills_a_cache,
    takes_positions,
)
from programmable_kv.errors import (
    ContextOverflowError,
    NonFiniteLogitsError,
    UnsupportedModelError,
    UnverifiedError,
)
from programmable_kv.verify.relocation import CachedLayer, PositionEncoding, RelocationProof, Verdict, prove_relocation
from programmable_kv.verify.rows import RowsProof, prove_rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens to compute: ids, the slots they go to and the positions they stand at, all ascending."""

    ids: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.slots) == len(self.positions):
            raise ValueError("ids, slots and positions must have one entry for each row")
        if any(a >= b for a, b in zip(self.slots, self.slots[1:], strict=False)):
            raise ValueError("slots must ascend")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def appended(cls, ids: Sequence[int], slot: int, position: int) -> Rows:
        count = len(ids)
        return cls(tuple(ids), tuple(range(slot, slot + count)), tuple(range(position, position + count)))

    def then(self, other: Rows) -> Rows:
        """These rows and later ones, in one forward."""
        return Rows(self.ids + other.ids, self.slots + other.slots, self.positions + other.positions)


class Engine:
    """Runs a transformers causal language model on a `KVBuffer`, and counts what it computes."""

    def __init__(self, model: Any) -> None:
        """`model`: a transformers causal LM in eval mode, with sdpa, eager or this package's grouped sdpa attention.

        Raises:
            UnsupportedModelError: a layer does not cache per-token keys and values.
        """
        self.model = model
        self.layout = KVLayout.read(model)
        self.layout.require_tokens_only()
        self.meter = Meter()
        self._proof: RelocationProof | None = None
        self._rows_proof: RowsProof | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    def new_buffer(self, capacity: int = 0) -> KVBuffer:
        return KVBuffer(self.layout, capacity=capacity, meter=self.meter)

    # -- computing ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute(self, buffer: KVBuffer, rows: Rows, *, logits: int = 1) -> torch.Tensor:
        """Compute rows against the buffer and write them into it.

        Returns the logits of the last `logits` rows, [logits, vocabulary]; 0 skips the vocabulary projection.

        Raises:
            ContextOverflowError: a position is beyond what the model was made for. Nothing was written.
            NonFiniteLogitsError: NaN or infinity in the logits (or, without any, in the rows). They were written: roll back.
        """
        self._check_positions(rows)
        with buffer.writing(rows.slots, rows.positions) as target:
            appended = isinstance(target.slots, slice) and target.slots.stop == target.visible
            mask: Any = None
            if not (appended and buffer.dense_until(target.visible)):
                additive = self.dtype if self.model.config._attn_implementation == "eager" else None
                keys = buffer.positions_until(target.visible).to(self.device)
                queries = torch.tensor(rows.positions, device=self.device)
                mask = attention_masks(self.layout, queries, keys, additive=additive)
            output = self._forward(buffer, rows, mask, logits)
        self.meter.tokens_computed += len(rows)
        # What is not finite anywhere is not finite in the last layer's values either: a sum carries it there.
        written = buffer.layers[-1].values[:, :, target.slots]
        if not bool(torch.isfinite(output if logits else written).all()):
            raise NonFiniteLogitsError(
                "the model computed NaN or infinity, so nothing can be read from these rows. Check the weights and the dtype "
                "(float16 overflows on many models). A notebook is as it was before the call; a bare buffer has to be rolled "
                "back."
            )
        return output

    def _forward(self, buffer: KVBuffer, rows: Rows, mask: Any, logits: int) -> torch.Tensor:
        # An empty index keeps no row; the integer 0 would mean "all rows" to transformers.
        keep: Any = logits if logits else torch.empty(0, dtype=torch.long, device=self.device)
        output = self.model(
            input_ids=torch.tensor([rows.ids], device=self.device),
            position_ids=torch.tensor([rows.positions], device=self.device),
            attention_mask=mask,
            past_key_values=buffer,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _check_positions(self, rows: Rows) -> None:
        limit = self.layout.position_limit
        if limit is not None and rows.positions and rows.positions[-1] >= limit:
            raise ContextOverflowError(
                f"position {rows.positions[-1]} is beyond the {limit} positions of {self.layout.model_type}. "
                "Shorten the context or the value, or load a model with a longer context."
            )

    def check_length(self, length: int) -> None:
        """
        Raises:
            ContextOverflowError: the model has fewer positions than that.
        """
        limit = self.layout.position_limit
        if limit is not None and length > limit:
            raise ContextOverflowError(
                f"the context needs {length} positions, and {self.layout.model_type} has {limit}. Shorten it, or load a "
                "model with a longer context."
            )

    def append(self, buffer: KVBuffer, ids: Sequence[int], *, logits: int = 1) -> torch.Tensor:
        """Compute tokens after the last one in the buffer."""
        return self.compute(buffer, Rows.appended(ids, buffer.length, buffer.next_position), logits=logits)

    # -- reading -----------------------------------------------------------------------------------------------

    def stream_greedy(self, buffer: KVBuffer, first_logits: torch.Tensor, stop_ids: frozenset[int]) -> Iterator[int]:
        """Greedy tokens from the logits of the last row on, each appended before the next is drawn.

        A stop token is neither yielded nor appended. The caller ends the stream by not drawing further.
        """
        logits = first_logits
        while (token := int(logits[-1].argmax())) not in stop_ids:
            yield token
            logits = self.append(buffer, [token])

    def stream_sampled(
        self, buffer: KVBuffer, first_logits: torch.Tensor, stop_ids: frozenset[int], temperature: float, seed: int
    ) -> Iterator[int]:
        """As `stream_greedy`, but sampled at a temperature from a seeded generator (on the CPU, for reproducibility)."""
        generator = torch.Generator().manual_seed(seed)
        logits = first_logits
        while True:
            weights = torch.softmax(logits[-1].float().cpu() / temperature, dim=-1)
            token = int(torch.multinomial(weights, 1, generator=generator))
            if token in stop_ids:
                return
            yield token
            logits = self.append(buffer, [token])

    @torch.no_grad()
    def attention_of(self, buffer: KVBuffer, rows: Rows) -> torch.Tensor:
        """How much the last of `rows` attends to every slot it sees, weighted by the size of what it reads there.

        Returns [S]: over layers and heads, the mean of (attention weight x norm of the value vector; with MLA, of the latent
        that values are made from), with the rows computed against the buffer as it is. The buffer is left as it was.
        Source: Kobayashi et al., Attention is Not Only a Weight (arXiv 2004.10102), section 3.
        """
        implementation = self.model.config._attn_implementation
        mark = buffer.mark()
        try:
            self.model.set_attn_implementation("eager")
            self._check_positions(rows)
            with buffer.writing(rows.slots, rows.positions) as target:
                keys = buffer.positions_until(target.visible).to(self.device)
                queries = torch.tensor(rows.positions, device=self.device)
                output = self.model(
                    input_ids=torch.tensor([rows.ids], device=self.device),
                    position_ids=torch.tensor([rows.positions], device=self.device),
                    attention_mask=attention_masks(self.layout, queries, keys, additive=self.dtype),
                    past_key_values=buffer,
                    use_cache=True,
                    output_attentions=True,
                    logits_to_keep=1,
                )
            self.meter.tokens_computed += len(rows)
            influence = torch.zeros(target.visible, dtype=torch.float32, device=self.device)
            for index, attention in enumerate(output.attentions):
                weights = attention[0, :, -1, :].float()
                layer, rotated = buffer.layers[index], self.relocation.layout.layers[index].rotated
                read = layer.values if rotated == "keys" else layer.keys
                norms = read[0, :, : target.visible].float().norm(dim=-1)
                groups = weights.shape[0] // norms.shape[0]
                influence += (weights * norms.repeat_interleave(groups, dim=0)).mean(dim=0)
            return influence / len(output.attentions)
        finally:
            self.model.set_attn_implementation(implementation)
            buffer.rollback(mark)

    # -- relocation --------------------------------------------------------------------------------------------

    @property
    def relocation(self) -> RelocationProof:
        """Whether relocation is exact on these weights, found out once by computing it both ways."""
        if self._proof is None:
            with self._unmetered():
                try:
                    self._proof = prove_relocation(self.layout, self._cached_alone, self._vocabulary, self.dtype)
                except (ValueError, RuntimeError, IndexError, TypeError, FloatingPointError) as error:
                    reason = f"the check could not be run ({str(error).splitlines()[0]})"
                    self._proof = RelocationProof(Verdict.REFUSED, self.layout, float("inf"), reason)
        return self._proof

    @property
    def rows(self) -> RowsProof:
        """Whether rows in the middle of a context can be computed again on these weights, found out once."""
        if self._rows_proof is None:
            config = self.model.config.get_text_config(decoder=True).to_dict()
            windows = tuple(v for k, v in config.items() if "window" in k and isinstance(v, int) and v > 1)
            with self._unmetered():
                self._rows_proof = prove_rows(
                    self.layout, windows, self._prefilled_alone, self._recomputed, self._vocabulary, self.dtype
                )
        return self._rows_proof

    def verify(self) -> None:
        """Do both checks now, if they were not done yet: they take about a second, once."""
        _ = (self.rows, self.relocation)

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @contextmanager
    def _unmetered(self) -> Iterator[None]:
        """The model's checks are no part of anybody's operation."""
        meter, self.meter = self.meter, Meter()
        try:
            yield
        finally:
            self.meter = meter

    def _recomputed(self, buffer: KVBuffer, ids: tuple[int, ...], slots: tuple[int, ...]) -> torch.Tensor:
        return self.compute(buffer, Rows(ids, slots, slots))

    def _prefilled_alone(self, ids: tuple[int, ...], positions: tuple[int, ...]) -> KVBuffer:
        buffer = self.new_buffer(len(ids))
        self.compute(buffer, Rows(ids, tuple(range(len(ids))), positions), logits=0)
        return buffer

    def _cached_alone(
        self, ids: Sequence[int], positions: torch.Tensor | None, *, padding: int = 0
    ) -> list[CachedLayer]:
        """What each layer caches of tokens with nothing before them; through the buffer where positions are given."""
        if positions is None or positions.ndim > 1:
            return prefill_alone(self.model, ids, positions, padding=padding)
        buffer = self._prefilled_alone(tuple(ids), tuple(positions.tolist()))
        return [{"keys": buffer.keys(index), "values": buffer.values(index)} for index in range(len(buffer))]

    def require_rows(self, *, instead: str = "Use the erratum, suffix or full mode, which only append.") -> None:
        """
        Raises:
            UnverifiedError: rows in the middle of this model's context cannot be computed again.
        """
        if not self.rows.exact:
            raise UnverifiedError(
                f"rows in the middle of a context of this {self.layout.model_type} cannot be computed again: "
                f"{self.rows.reason}. {instead}"
            )

    def require_relocation(self, *, below: int | None = None) -> KVLayout:
        """The layout with which relocation was proved exact.

        `below`: no position before or after the relocation reaches this one, as far as the caller knows; needed for models
        that can be relocated within a bound only.

        Raises:
            UnverifiedError: keys of this model cannot be moved to another position, or have not been proved to.
        """
        name, proof = self.layout.model_type, self.relocation
        instead = "Keep the value's token length, or use the erratum, suffix or full mode, which relocate nothing."
        if proof.encoding is PositionEncoding.LEARNED:
            raise UnverifiedError(
                f"{name} keeps positions in the hidden states themselves (learned position embeddings, or positions that it "
                f"counts by itself), so nothing cached at one position is right at another: {proof.reason}. {instead}"
            )
        if not proof.exact:
            raise UnverifiedError(f"relocation is not exact on this {name}: {proof.reason}. {instead}")
        limit = self.layout.position_limit
        reached = min((bound for bound in (below, limit) if bound is not None), default=None)
        if proof.within is not None and (reached is None or reached > proof.within):
            raise UnverifiedError(f"relocation on this {name} is exact within a bound only ({proof.reason}). {instead}")
        if any(layer.rotates_more for layer in proof.layout.layers):
            raise UnverifiedError(
                f"{name} keeps more than one tensor a layer that turns, and a KVBuffer turns one of them. {instead}"
            )
        return proof.layout


@torch.no_grad()
def prefill_alone(
    model: Any, ids: Sequence[int], positions: torch.Tensor | None, *, padding: int = 0
) -> list[CachedLayer]:
    """Prefill with transformers' own cache, whatever its layers keep; returns all that each layer holds, by name.

    `positions` is [T], [A, T] for A position axes, or None to let the model count. The first `padding` ids are masked
    out. Tensors come as [B, H, T, D].

    Raises:
        UnsupportedModelError: the model returns no cache.
    """
    device = next(model.parameters()).device
    mask = torch.ones(1, len(ids), dtype=torch.long, device=device)
    mask[:, :padding] = 0
    arguments: dict[str, Any] = {}
    if positions is not None and takes_positions(model):
        arguments["position_ids"] = (positions[None] if positions.ndim == 1 else positions[:, None]).to(device)
    arguments |= {"input_ids": torch.tensor([list(ids)], device=device), "attention_mask": mask, "use_cache": True}
    empty = cache_that_drops_nothing(model)
    if empty is not None:
        arguments["past_key_values"] = empty
    output = model(**arguments)
    cache = output.get("past_key_values", output.get("cache_params"))
    if cache is None and empty is None and fills_a_cache(model):
        cache = arguments["past_key_values"] = DynamicCache(config=model.config)
        model(**arguments)
    if not isinstance(cache, Cache):
        raise UnsupportedModelError(
            f"{model.config.model_type} returns no cache of transformers' own kind, so there is nothing to relocate."
        )
    return [
        {name: tensor[:, None] if tensor.ndim == 3 else tensor for name, tensor in layer.items()}
        for layer in cached_tensors(cache)
    ]
