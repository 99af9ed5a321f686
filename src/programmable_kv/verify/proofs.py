"""The proofs of a model's weights. Each proof runs once, when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.rows import Rows
from programmable_kv.model_lock import lock_of
from programmable_kv.verify.alone import prefill_alone
from programmable_kv.verify.failures import is_out_of_memory, may_pass
from programmable_kv.verify.relocation import CachedLayer, RelocationProof, Verdict, prove_relocation
from programmable_kv.verify.rows import RowsProof, prove_rows

Compute = Callable[..., torch.Tensor]
"""Computes rows against a buffer, with the arguments of `Engine.compute`."""


class Proofs:
    """The proofs of one model. Safe to use from several threads."""

    def __init__(self, model: Any, layout: KVLayout) -> None:
        self._model, self._layout = model, layout
        self._lock = lock_of(model)
        self._relocation: RelocationProof | None = None
        self._rows: RowsProof | None = None

    def relocation(self, compute: Compute) -> RelocationProof:
        """Whether relocation is exact on these weights. The check runs once, on the first call.

        It compares relocated keys with keys computed in place. If the check fails to run, relocation is refused; if the
        reason may be temporary, the next call tries again.

        Raises:
            torch.OutOfMemoryError, MemoryError: there was not enough memory for the check, which then has no verdict.
        """
        with self._lock:
            if self._relocation is not None:
                return self._relocation
            try:
                proof = prove_relocation(self._layout, self.cached_alone(compute), *self._vocabulary_and_dtype())
            except (ValueError, RuntimeError, IndexError, TypeError, FloatingPointError) as error:
                if is_out_of_memory(error):
                    raise
                reason = f"the check could not be run ({(str(error) or type(error).__name__).splitlines()[0]})"
                proof = RelocationProof(Verdict.REFUSED, self._layout, float("inf"), reason)
                if may_pass(error):
                    return proof
            self._relocation = proof
            return proof

    def rows(self, compute: Compute) -> RowsProof:
        """Whether rows in the middle of a context can be recomputed exactly on these weights. The check runs once.

        A check that fails to run is treated as in `relocation`.
        """

        def prefilled(ids: tuple[int, ...], positions: tuple[int, ...]) -> KVBuffer:
            return self._prefilled_alone(compute, ids, positions)

        def recomputed(buffer: KVBuffer, ids: tuple[int, ...], slots: tuple[int, ...]) -> torch.Tensor:
            return compute(buffer, Rows(ids, slots, slots))

        with self._lock:
            if self._rows is not None:
                return self._rows
            config = self._model.config.get_text_config(decoder=True).to_dict()
            windows = tuple(v for k, v in config.items() if "window" in k and isinstance(v, int) and v > 1)
            proof = prove_rows(self._layout, windows, prefilled, recomputed, *self._vocabulary_and_dtype())
            if proof.settled:
                self._rows = proof
            return proof

    def cached_alone(self, compute: Compute) -> Callable[..., list[CachedLayer]]:
        """A function that prefills tokens alone and returns each layer's tensors; for 1-D positions with a buffer."""

        def cached(ids: Sequence[int], positions: torch.Tensor | None, *, padding: int = 0) -> list[CachedLayer]:
            if positions is None or positions.ndim > 1:
                return prefill_alone(self._model, ids, positions, padding=padding)
            buffer = self._prefilled_alone(compute, tuple(ids), tuple(positions.tolist()))
            return [{"keys": buffer.keys(index), "values": buffer.values(index)} for index in range(len(buffer))]

        return cached

    def _prefilled_alone(self, compute: Compute, ids: tuple[int, ...], positions: tuple[int, ...]) -> KVBuffer:
        buffer = KVBuffer(self._layout, capacity=len(ids))  # without a meter: a proof counts in no operation's account
        compute(buffer, Rows(ids, tuple(range(len(ids))), positions), logits=0)
        return buffer

    def _vocabulary_and_dtype(self) -> tuple[int, torch.dtype]:
        embeddings = self._model.get_input_embeddings().weight
        return int(embeddings.shape[0]), embeddings.dtype
