"""Changes to activations, as pure functions of rows.

`basis` is [d, k] with orthonormal columns. Rows are [n, d], or [n, heads, d] for head outputs. Values have the same
shape, or one that broadcasts to it, in the order of the given slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.hooks import Change

_ORTHONORMAL = 1e-4


def replaced(values: torch.Tensor) -> Change:
    """Replace the rows by other activations [slots, ...]: a patch, or an ablation if `values` is a mean."""
    return lambda rows, which: values.to(rows)[which].expand_as(rows)


def ablated(samples: torch.Tensor) -> Change:
    """Replace every row by the mean of samples [m, ...]."""
    mean = samples.mean(dim=0)
    return lambda rows, _: mean.to(rows).expand_as(rows)


def added(direction: torch.Tensor, scale: float = 1.0) -> Change:
    """Add a direction [d] (or one for each head, [heads, d])."""
    return lambda rows, _: rows + scale * direction.to(rows)


def projected_out(basis: torch.Tensor, origin: torch.Tensor | None = None) -> Change:
    """Remove the component along a subspace; with an `origin` [d], set it to the origin's component."""
    columns = _orthonormal(basis)

    def change(rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        off = rows if origin is None else rows - origin.to(rows)
        return rows - _along(off, columns)

    return change


def interchanged(values: torch.Tensor, basis: torch.Tensor) -> Change:
    """Replace only the rows' component along a subspace, by that of other activations [slots, ...].

    Source: Geiger et al., Finding Alignments Between Interpretable Causal Variables (arXiv 2303.02536), section 3.
    """
    columns = _orthonormal(basis)
    return lambda rows, which: rows + _along(values.to(rows)[which] - rows, columns)


def of_heads(change: Change, heads: Sequence[int]) -> Change:
    """Apply a change only to some heads of rows [n, heads, d]; `change` gets [n, len(heads), d]."""
    chosen = torch.tensor(list(heads))

    def some(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        if rows.ndim != 3:
            raise InvalidArgumentError(f"only head outputs have heads; these rows have shape {list(rows.shape)}")
        result = rows.clone()
        result[:, chosen] = change(rows[:, chosen], which)
        return result

    return some


def _orthonormal(basis: torch.Tensor) -> torch.Tensor:
    """
    Raises:
        InvalidArgumentError: the columns are not orthonormal.
    """
    if basis.ndim != 2:
        raise InvalidArgumentError(f"a basis is [d, k], got shape {list(basis.shape)}")
    off = (
        (basis.detach().T @ basis.detach() - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device))
        .abs()
        .max()
    )
    if not float(off) <= _ORTHONORMAL:
        raise InvalidArgumentError(f"the columns of a basis must be orthonormal; these are off by {float(off):.1e}")
    return basis


def _along(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    columns = basis.to(rows)
    return rows @ columns @ columns.T
