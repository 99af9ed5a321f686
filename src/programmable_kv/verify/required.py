"""Checks that an operation's proof holds; the error says why not and what to use instead."""

from __future__ import annotations

from programmable_kv.cache.layout import KVLayout
from programmable_kv.errors import UnverifiedError
from programmable_kv.verify.relocation import PositionEncoding, RelocationProof
from programmable_kv.verify.rows import RowsProof


def require_rows(proof: RowsProof, model_type: str, instead: str) -> None:
    """
    Raises:
        UnverifiedError: rows in the middle of this model's context cannot be recomputed exactly; the message ends with
            `instead`.
    """
    if not proof.exact:
        raise UnverifiedError(
            f"rows in the middle of a context cannot be recomputed on this {model_type}: {proof.reason}. {instead}"
        )


def require_relocation(proof: RelocationProof, below: int | None, layout: KVLayout) -> KVLayout:
    """The layout with which relocation was proved exact. `layout` is the one that was read from the model.

    `below`: an upper bound (exclusive) on every position before and after the relocation; None if the caller knows
    none.

    Raises:
        UnverifiedError: keys of this model cannot be moved to another position, or have not been proved to.
    """
    name = layout.model_type
    instead = "Keep the value's token length, or use the erratum, suffix or full mode, which relocate nothing."
    if proof.encoding is PositionEncoding.LEARNED:
        raise UnverifiedError(
            f"{name} has positions in its hidden states (learned position embeddings, or positions that it counts "
            f"itself), so nothing cached at one position is valid at another: {proof.reason}. {instead}"
        )
    if not proof.exact:
        raise UnverifiedError(f"relocation is not exact on this {name}: {proof.reason}. {instead}")
    reached = min((bound for bound in (below, layout.position_limit) if bound is not None), default=None)
    if proof.within is not None and (reached is None or reached > proof.within):
        raise UnverifiedError(f"relocation on this {name} is exact only within a bound ({proof.reason}). {instead}")
    if any(layer.rotates_more for layer in proof.layout.layers):
        raise UnverifiedError(
            f"{name} caches more than one rotating tensor per layer, but a KVBuffer rotates only one. {instead}"
        )
    return proof.layout
