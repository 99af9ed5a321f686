"""The one place that runs the transformer.

Everything that a notebook computes uses one primitive: *compute these rows*. Rows are tokens with a slot and a
position; they may be appended, lie in the middle of the context, or both. A single forward writes their keys and values
into the buffer layer by layer, so a recomputed field is already in place, in every layer, when an erratum or a question
in the same forward attends to it. One forward for all of them reads the weights once instead of three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from programmable_kv.account import Meter
from programmable_kv.cache.attention import LastRow, recording
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout, Reach
from programmable_kv.cache.masks import PartReads, attention_masks
from programmable_kv.cache.rows import Rows
from programmable_kv.cache.transformers_api import (
    GROUPED_ANY,
    GROUPED_SDPA,
    Cache,
    DynamicCache,
    decoder_of,
    register_attention,
    reset_frequencies,
)
from programmable_kv.errors import ContextOverflowError, InvalidArgumentError, NonFiniteLogitsError
from programmable_kv.model_lock import lock_of
from programmable_kv.verify.proofs import Proofs
from programmable_kv.verify.relocation import RelocationProof
from programmable_kv.verify.required import require_relocation, require_rows
from programmable_kv.verify.rows import RowsProof

__all__ = ["CHUNK", "Engine", "Graph", "Progress", "Rows", "greedy"]

CHUNK = 2048
"""The largest number of rows in one forward. A longer prefill reports progress and can be interrupted between forwards.
This costs little: in CPU time on the embedded model's shape, 3% more than one forward at 4096 tokens, 13% at 8192."""

Progress = Callable[[int, int], None]
"""(rows computed, rows in all), called after each forward; an exception that it raises ends the computation."""


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A forward through which gradients can be computed."""

    logits: torch.Tensor
    """[T, vocabulary]"""
    keys: list[torch.Tensor]
    """the cached keys of each layer, [1, H, S, D]: leaves of the graph"""
    values: list[torch.Tensor]
    last: list[LastRow]
    """the last row's attention in each layer"""
    read: list[torch.Tensor]
    """the values that the last row reads, including those of the appended rows, [1, H, S + T, D] in each layer"""


def greedy(logits: torch.Tensor) -> int:
    """The most likely token, from logits [V]."""
    return int(logits.argmax())


class Engine:
    """Runs a transformers causal language model on a `KVBuffer`, and counts what it computes.

    Several engines and threads may share a model, each with its own buffers: forwards of one model run one at a time.
    """

    def __init__(self, model: Any) -> None:
        """`model`: a transformers causal LM in eval mode, with sdpa, eager or this package's grouped sdpa attention.

        Raises:
            InvalidArgumentError: `model` is not a transformers model.
            UnsupportedModelError: a layer does not cache per-token keys and values.
        """
        if not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
            raise InvalidArgumentError(
                f"an Engine needs a transformers causal language model; got {type(model).__name__}"
            )
        self.model: Any = model
        self.layout = KVLayout.read(model)
        self.layout.require_tokens_only()
        self.meter = Meter()
        """what this engine has done in the calling thread"""
        self._lock = lock_of(model)
        self._proofs = Proofs(model, self.layout)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model has an embedding for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def new_buffer(self, capacity: int = 0) -> KVBuffer:
        return KVBuffer(self.layout, capacity=capacity, meter=self.meter)

    # -- computing ---------------------------------------------------------------------------------------------

    def compute(
        self,
        buffer: KVBuffer,
        rows: Rows,
        *,
        logits: int = 1,
        chunk: int = CHUNK,
        progress: Progress | None = None,
        reads: PartReads | None = None,
    ) -> torch.Tensor:
        """Compute rows against the buffer and write them into it, in forwards of about `chunk` rows.

        Returns the logits of the last `logits` rows, [logits, vocabulary]; 0 skips the vocabulary projection. If
        anything is raised (also by `progress` or Ctrl-C), the buffer returns to its previous length; overwritten rows
        are restored only by a rollback to a mark. `reads` says which parts the rows may read; None means everything
        before them.

        Raises:
            InvalidArgumentError: an argument has the wrong type, or a token id is not in the vocabulary.
            ContextOverflowError: a position is beyond the model's position limit. Nothing was written.
            FrequencyRegimeError: the rows would get other frequencies than the rows that stay. Nothing was written.
            NonFiniteLogitsError: the logits contain NaN or infinity (or, without logits, the rows' values do).
        """
        ids = self._checked(buffer, rows, logits, chunk)
        self._check_positions(rows)
        before = buffer.length
        try:
            for start, stop in rows.forwards(self.layout.frequency_rules, logits, chunk):
                kept = logits if stop == len(rows) else 0
                output = self._compute_some(buffer, ids[start:stop], rows.part(start, stop), kept, reads)
                if progress is not None:
                    progress(stop, len(rows))
        except BaseException:
            buffer.truncate(min(before, buffer.length))
            raise
        return output

    @torch.no_grad()
    def _compute_some(
        self, buffer: KVBuffer, ids: torch.Tensor, rows: Rows, logits: int, reads: PartReads | None
    ) -> torch.Tensor:
        with self._lock, buffer.writing(rows.slots, rows.positions) as target:
            appended = isinstance(target.slots, slice) and target.slots.stop == target.visible
            mask: Any = None
            # For rows in the last slots, transformers' mask by index equals the mask by position if every layer attends
            # to all earlier tokens (only the order counts), or if the positions have no holes.
            order_only = all(layer.reach is Reach.FULL for layer in self.layout.layers)
            if reads is not None or not (appended and (order_only or buffer.dense_until(target.visible))):
                eager = self.model.config._attn_implementation == "eager"
                mask = self._mask(buffer, rows, target.visible, eager=eager, reads=reads)
            output = self._forward(buffer, ids, rows, mask, logits).logits[0]
        buffer.meter.count(computed=len(rows))
        # A non-finite number in any layer reaches the last layer's values through the residual sum, so one check is
        # enough.
        written = buffer.layers[-1].values[:, :, target.slots]
        if not bool(torch.isfinite(output if logits else written).all()):
            raise NonFiniteLogitsError(
                "the model computed NaN or infinity, so the results of these rows cannot be used. Check the weights "
                "and the dtype (float16 overflows on many models). A notebook is unchanged; roll back a bare buffer "
                "yourself."
            )
        return output  # type: ignore[no-any-return]

    def _mask(self, buffer: KVBuffer, rows: Rows, visible: int, *, eager: bool, reads: PartReads | None = None) -> Any:
        keys = buffer.positions_until(visible).to(self.device)
        queries = torch.tensor(rows.positions, device=self.device)
        allowed = None if reads is None else reads.allowed(rows.slots, visible).to(self.device)
        additive = self.dtype if eager else None
        return attention_masks(self.layout, queries, keys, additive=additive, allowed=allowed)

    def _forward(self, buffer: Cache, ids: torch.Tensor, rows: Rows, mask: Any, logits: int, **more: Any) -> Any:
        if any(rule.every_length and rows.positions[-1] + 1 >= rule.within for rule in self.layout.frequency_rules):
            reset_frequencies(decoder_of(self.model), self.model.get_input_embeddings().weight[:1])
        # An empty index keeps no row; the integer 0 would mean "all rows" to transformers.
        keep: Any = logits if logits else torch.empty(0, dtype=torch.long, device=self.device)
        return self.model(
            input_ids=ids[None].to(self.device),
            position_ids=torch.tensor([rows.positions], device=self.device),
            attention_mask=mask,
            past_key_values=buffer,
            use_cache=True,
            logits_to_keep=keep,
            **more,
        )

    def _checked(self, buffer: KVBuffer, rows: Rows, logits: int, chunk: int) -> torch.Tensor:
        """The ids of the rows, [T] on the CPU.

        Raises:
            InvalidArgumentError: an argument has the wrong type, or a token id is not in the vocabulary.
        """
        if not isinstance(buffer, KVBuffer) or not isinstance(rows, Rows):
            raise InvalidArgumentError(
                f"compute needs a KVBuffer and Rows; got {type(buffer).__name__} and {type(rows).__name__}"
            )
        for name, number, least in (("logits", logits, 0), ("chunk", chunk, 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InvalidArgumentError(f"{name} must be a whole number of rows, at least {least}; got {number!r}")
        return rows.token_ids(self.vocabulary)

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
            ContextOverflowError: the model has fewer than `length` positions.
        """
        limit = self.layout.position_limit
        if limit is not None and length > limit:
            raise ContextOverflowError(
                f"the context needs {length} positions, but {self.layout.model_type} has {limit}. Shorten it, or load "
                "a model with a longer context."
            )

    def require_same_regime(self, buffer: KVBuffer, first_row_position: int, last_row_position: int) -> None:
        """Check that recomputing all rows from the first to the last position uses the frequencies of the other rows.

        A plan calls this; if it raises, prefill the whole context instead. `compute` makes the same check itself.

        Raises:
            FrequencyRegimeError: the rows would be computed with other frequencies than the cached rows before or after
                them.
        """
        positions = buffer.positions
        staying = int(((positions < first_row_position) | (positions > last_row_position)).sum())
        buffer.require_tables(last_row_position + 1, remaining=staying)

    def append(
        self,
        buffer: KVBuffer,
        ids: Sequence[int],
        *,
        logits: int = 1,
        chunk: int = CHUNK,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Compute tokens after the last one in the buffer. Arguments and errors are those of `compute`."""
        if not isinstance(buffer, KVBuffer):
            raise InvalidArgumentError(f"append needs a KVBuffer; got {type(buffer).__name__}")
        rows = Rows.appended(ids, buffer.length, buffer.next_position)
        return self.compute(buffer, rows, logits=logits, chunk=chunk, progress=progress)

    # -- reading -----------------------------------------------------------------------------------------------

    def stream(
        self,
        buffer: KVBuffer,
        first_logits: torch.Tensor,
        stop_ids: frozenset[int],
        choose: Callable[[torch.Tensor], int] = greedy,
    ) -> Iterator[int]:
        """Generate tokens, starting from the logits of the last row; each token is appended before the next is chosen.

        A stop token is neither yielded nor appended. Without a stop token the stream goes on for as long as it is read.

        Args:
            choose: returns the next token, from logits [V]; the most likely one by default.
        """
        logits = first_logits
        while (token := choose(logits[-1])) not in stop_ids:
            yield token
            logits = self.append(buffer, [token])

    def attention_of(self, buffer: KVBuffer, rows: Rows) -> torch.Tensor:
        """How much the last of `rows` attends to each slot it sees, weighted by the norm of the value in that slot.

        Returns [S]: the mean over layers and heads of attention weight x norm of the value vector (with MLA, of the
        latent from which the values are made). The rows are computed against the buffer, which is unchanged.
        Source: Kobayashi et al., Attention is Not Only a Weight (arXiv 2004.10102), section 3.
        """
        layers = self.relocation.layout.layers
        with self._tried(buffer, rows) as (ids, visible):
            _, weights = self._last_row_read(buffer, ids, rows, visible)
            influence = torch.zeros(visible, dtype=torch.float32, device=self.device)
            for layer, rule, attention in zip(buffer.layers, layers, weights, strict=True):
                read = layer.values if rule.rotated == "keys" else layer.keys
                norms = read[0, :, :visible].float().norm(dim=-1)
                groups = attention.shape[0] // norms.shape[0]
                influence += (attention.float() * norms.repeat_interleave(groups, dim=0)).mean(dim=0)
            return influence / len(weights)

    def attention_weights(self, buffer: KVBuffer, rows: Rows) -> list[torch.Tensor]:
        """The attention weights of the last of `rows`, [heads, S] in each layer, over the slots that it sees.

        The rows are computed against the buffer, which is unchanged. With this package's attention, only one row's
        weights are ever in memory.
        """
        return self.last_row_read(buffer, rows)[1]

    def last_row_read(self, buffer: KVBuffer, rows: Rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits [V] of the last of `rows` and its weights as in `attention_weights`, from one forward."""
        with self._tried(buffer, rows) as (ids, visible):
            return self._last_row_read(buffer, ids, rows, visible)

    @contextmanager
    def _tried(self, buffer: KVBuffer, rows: Rows) -> Iterator[tuple[torch.Tensor, int]]:
        """Let a forward in the block write the rows, then undo it. Yields their ids [T] and how many slots they see."""
        ids = self._checked(buffer, rows, 1, CHUNK)
        self._check_positions(rows)
        mark = buffer.mark()
        try:
            with torch.no_grad(), self._lock, buffer.writing(rows.slots, rows.positions) as target:
                yield ids, target.visible
            buffer.meter.count(computed=len(rows))
        finally:
            buffer.rollback(mark)

    @contextmanager
    def _attention_as(self, implementation: str) -> Iterator[None]:
        """Switch the model's attention implementation inside the block. The caller holds the lock."""
        usual = self.model.config._attn_implementation
        try:
            if implementation != usual:
                self.model.set_attn_implementation(implementation)
            yield
        finally:
            if self.model.config._attn_implementation != usual:
                self.model.set_attn_implementation(usual)

    def _last_row_read(
        self, buffer: KVBuffer, ids: torch.Tensor, rows: Rows, visible: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last row's logits, [V], and its attention in each layer, [heads, S]. The caller holds the model's lock.

        With this package's attention the forward is the usual one. Any other implementation is switched for the
        forward, which is why the lock is needed; eager attention returns its weights itself.
        """
        if self.model.config._attn_implementation in (GROUPED_SDPA, "sdpa"):
            register_attention()
            with self._attention_as(GROUPED_SDPA), recording() as found:
                output = self._forward(buffer, ids, rows, self._mask(buffer, rows, visible, eager=False), 1)
            if len(found) == len(buffer.layers):
                return output.logits[0, -1], [each.weights for each in found]
        with self._attention_as("eager"):
            mask = self._mask(buffer, rows, visible, eager=True)
            output = self._forward(buffer, ids, rows, mask, 1, output_attentions=True)
            return output.logits[0, -1], [attention[0, :, -1] for attention in output.attentions]

    @contextmanager
    def graph(self, buffer: KVBuffer, rows: Rows) -> Iterator[Graph]:
        """The logits of appended rows as a differentiable function of the cached keys and values, inside the block.

        The forward uses this package's attention and a separate cache with copies. The buffer is unchanged.

        Raises:
            InvalidArgumentError: the rows are not appended, or the model does not run this package's attention.
        """
        past = buffer.length
        if rows.slots != tuple(range(past, past + len(rows))):
            raise InvalidArgumentError(f"gradients are available only for rows appended after the {past} slots in use")
        keys = [buffer.keys(index).detach().clone().requires_grad_() for index in range(len(buffer))]
        values = [buffer.values(index).detach().clone().requires_grad_() for index in range(len(buffer))]
        cache = DynamicCache()
        register_attention()
        with self._tried(buffer, rows) as (ids, visible), torch.enable_grad():
            for index, pair in enumerate(zip(keys, values, strict=True)):
                cache.update(*pair, index)
            with self._attention_as(GROUPED_ANY), recording() as last:
                mask = self._mask(buffer, rows, visible, eager=False)
                logits = self._forward(cache, ids, rows, mask, len(rows)).logits[0]
            if len(last) != len(buffer):
                raise InvalidArgumentError(
                    f"{self.layout.model_type} does not use this package's attention, which gradients need"
                )
            yield Graph(logits, keys, values, last, [layer.values.detach() for layer in cache.layers])

    # -- proofs ------------------------------------------------------------------------------------------------

    @property
    def relocation(self) -> RelocationProof:
        """Whether relocation is exact on these weights: see `Proofs.relocation`."""
        return self._proofs.relocation(self.compute)

    @property
    def rows(self) -> RowsProof:
        """Whether rows in the middle of a context can be recomputed exactly on these weights: see `Proofs.rows`."""
        return self._proofs.rows(self.compute)

    def verify(self) -> None:
        """Run both checks now, unless they have run. They take about a second. Safe to call from several threads."""
        _ = (self.rows, self.relocation)

    def require_rows(self, *, instead: str = "Use the erratum, suffix or full mode, which only append.") -> None:
        """
        Raises:
            UnverifiedError: rows in the middle of this model's context cannot be recomputed exactly.
        """
        require_rows(self.rows, self.layout.model_type, instead)

    def require_relocation(self, *, below: int | None = None) -> KVLayout:
        """The layout with which relocation was proved exact.

        `below`: an upper bound (exclusive) on every position before and after the relocation, None if the caller knows
        none; needed for models on which relocation is exact within a bound only.

        Raises:
            UnverifiedError: keys of this model cannot be moved to another position, or have not been proved to.
        """
        return require_relocation(self.relocation, below, self.layout)
