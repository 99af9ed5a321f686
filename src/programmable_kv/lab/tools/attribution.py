"""First-order attribution: estimates how much each cached row and each head would move a decision if it were patched.

One forward and one backward rank every (layer, KV head, slot) at once, so that exact effects need to be computed only
for the top of the ranking. The effect of a layer's attention output on the decision is a first-order estimate. The
effect of a patch on
that output is exact: the softmax is recomputed, because a gradient through a saturated softmax misses effects.

With `drop`, there is one more gradient for each layer. In it, no gradient passes through what that layer adds. The
score is the mean of the absolute effects, which also shows an effect that another one cancels.
Source: Kramar et al., AtP* (arXiv 2403.00745), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from programmable_kv.cache.attention import LastRow
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.modules import DecoderModules
from programmable_kv.engine import Engine, Graph, Rows
from programmable_kv.errors import InvalidArgumentError, UnsupportedModelError
from programmable_kv.lab.tools.copies import copied

Target = Callable[[torch.Tensor], torch.Tensor]
"""logits of the last row [vocabulary] -> the number to explain (a gap)"""


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """Estimated effects of patches on the target."""

    rows: torch.Tensor
    """[L, H, S] effect of patching a slot's key and value in one layer and KV head (with `drop`, without sign)"""
    linear: torch.Tensor
    """[L, H, S] effect of the same patches by plain gradients, for comparison"""
    heads: torch.Tensor | None
    """[L, query heads] effect of patching a head's output in the last row; None without `head_outputs`"""

    def by_slot(self) -> torch.Tensor:
        """Return each slot's effect, summed over all layers and heads, [S]."""
        return self.rows.sum(dim=(0, 1))


def attribute(
    engine: Engine,
    buffer: KVBuffer,
    source: KVBuffer,
    rows: Rows,
    target: Target,
    *,
    drop: bool = False,
    head_outputs: Sequence[torch.Tensor] | None = None,
) -> Attribution:
    """Estimate how much the target would change if each cached row were replaced by the source's.

    The buffer is unchanged.

    Args:
        source: the other context; its slots have the same positions.
        rows: rows to append and compute; the target is computed from the last one.
        drop: whether to add a gradient for each layer (see the module's docstring).
        head_outputs: head outputs of the source's last row in each layer, [heads, D_v] (see `recorded`).

    Raises:
        InvalidArgumentError: the two contexts do not have the same slots.
        UnsupportedModelError: the model caches something else than the keys and values of its attention (MLA).
    """
    past = buffer.length
    if source.length < past or not torch.equal(source.positions[:past], buffer.positions):
        raise InvalidArgumentError("the two contexts must have the same slots at the same positions")
    layers = len(buffer)
    if any(layer.rotated != "keys" for layer in engine.relocation.layout.layers):
        raise UnsupportedModelError(
            f"{engine.layout.model_type} does not cache the keys and values that its attention reads (MLA)"
        )
    with _watched(engine, buffer) as watched, engine.graph(buffer, rows) as graph:
        if graph.last[0].query.shape[-1] != graph.keys[0].shape[-1]:
            raise UnsupportedModelError(
                f"{engine.layout.model_type} does not cache the keys and values that its attention reads (MLA)"
            )
        changes = [_output_changes(graph, source, layer) for layer in range(layers)]
        kept = graph.keys[0].shape[1]
        value = target(graph.logits[-1])
        wanted = [*watched.heads, *graph.keys, *graph.values]
        plain = torch.autograd.grad(value, wanted)
        slopes = [each[0, -1:] for each in plain[:layers]]
        by_row = torch.stack([_effects(g, c, kept)[0] for g, c in zip(slopes, changes, strict=True)])
        linear = torch.stack([_linear(plain, graph, source, layer) for layer in range(layers)])
        heads = None if head_outputs is None else _head_effects(plain, watched, head_outputs)
    if drop:
        # A dropped layer shows no effect of its own, so each layer's mean is over the other layers.
        slopes = _dropped(engine, buffer, rows, target)
        every = [_effects(g, c, kept).abs().sum(dim=0) for g, c in zip(slopes, changes, strict=True)]
        by_row = torch.stack(every) / max(1, layers - 1)
    return Attribution(by_row, linear, heads)


def _dropped(engine: Engine, buffer: KVBuffer, rows: Rows, target: Target) -> list[torch.Tensor]:
    """Return each layer's gradients [dropped layers, heads * D_v] of its heads in the last row, by the dropped layer.

    All are computed in one forward and one backward. Each dropped layer has a copy of the rows, in which the layer
    passes no gradient.
    """
    count = len(buffer)
    with (
        copied(engine, buffer, rows, count) as copies,
        _watched(engine, buffer, copies=count) as watched,
        engine.graph(buffer, copies) as graph,
    ):
        value = torch.stack([target(each) for each in graph.logits[-count:]]).sum()
        return [each[0, -count:] for each in torch.autograd.grad(value, watched.heads)]


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    heads: list[torch.Tensor]
    """input of each layer's output projection, [1, T, heads * D_v]"""


@contextmanager
def _watched(engine: Engine, buffer: KVBuffer, *, copies: int = 0) -> Iterator[_Watched]:
    """Record head outputs of this buffer's forward. In copy i of the rows, block the gradient of what layer i adds."""
    modules = DecoderModules.of(engine.model)
    watched = _Watched([])
    handles = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        if buffer.target is not None:
            watched.heads.append(args[0])

    def gate(layer: int) -> Callable[..., Any]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if buffer.target is None:
                return None
            whole = output[0] if isinstance(output, tuple) else output
            before = args[0] if args else kwargs["hidden_states"]
            added = whole - before
            passes = torch.ones_like(added)
            passes[:, layer::copies] = 0
            if added.requires_grad:
                added.register_hook(lambda gradient: gradient * passes)
            return (before + added, *output[1:]) if isinstance(output, tuple) else before + added

        return after

    try:
        for index, (layer, projection) in enumerate(zip(modules.layers, modules.projections, strict=True)):
            handles.append(projection.register_forward_pre_hook(keep))
            if copies:
                handles.append(layer.register_forward_hook(gate(index), with_kwargs=True))
        yield watched
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _output_changes(graph: Graph, source: KVBuffer, layer: int) -> torch.Tensor:
    """Return the exact change of the last row's head outputs when each slot alone is patched, [heads, S, D_v].

    Without slot p, the other slots have a total weight of e^l, and a head's output is o. With a new score s and value v
    for slot p, the output is u v + (1 - u) o, where u = sigmoid(s - l). So no softmax weight of nearly 1 is divided
    out.
    """
    last: LastRow = graph.last[layer]
    kept, past = graph.keys[layer].shape[1:3]
    groups, compute = last.scores.shape[0] // kept, last.scores.dtype

    def by_query_head(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0].repeat_interleave(groups, dim=0).to(compute)

    values = by_query_head(graph.read[layer])
    others, read_others, read = _without_each(last.scores, values, past)
    scores = [_scores(last, by_query_head(keys)) for keys in (graph.keys[layer], source.keys(layer)[:, :, :past])]
    # Anything else that was added to a score (a bias by position) is kept.
    now = last.scores[:, :past] + scores[1] - scores[0]
    share = torch.sigmoid(now - others)[..., None]
    changed = share * by_query_head(source.values(layer)[:, :, :past]) + (1 - share) * read_others
    return torch.where(last.scores[:, :past, None].isfinite(), changed - read[:, None], 0.0)


def _without_each(
    scores: torch.Tensor, values: torch.Tensor, past: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return head outputs without each of the first `past` slots.

    These are the log of the other slots' total weight [heads, S], the output from the other slots [heads, S, D_v], and
    the output from all slots [heads, D_v].
    """
    weights = scores.softmax(dim=-1)
    read = (weights[:, None] @ values)[:, 0]
    own = weights[:, :past]
    total = torch.logsumexp(scores, dim=-1, keepdim=True) + torch.log1p(-own.clamp_max(0.5))
    others = (read[:, None] - own[..., None] * values[:, :past]) / (1 - own.clamp_max(0.5))[..., None]
    # At most one slot of a head has more than half of the weight. For it, the subtraction above would cancel digits.
    for head, slot in (own > 0.5).nonzero().tolist():
        rest = scores[head].clone()
        rest[slot] = float("-inf")
        total[head, slot] = torch.logsumexp(rest, dim=-1)
        others[head, slot] = rest.softmax(dim=-1).nan_to_num() @ values[head]
    return total, others, read


def _scores(last: LastRow, keys: torch.Tensor) -> torch.Tensor:
    """Return the last row's attention scores [heads, S] for keys [heads, S, D]."""
    scores = (keys @ last.query.to(keys.dtype)[:, :, None])[..., 0] * last.scaling
    return scores if last.softcap is None else torch.tanh(scores / last.softcap) * last.softcap


def _effects(gradients: torch.Tensor, changes: torch.Tensor, kept_heads: int) -> torch.Tensor:
    """Return effects by KV head [n, H, S], from last-row gradients [n, heads * D_v] and changes [heads, S, D_v]."""
    heads, past, width = changes.shape
    slopes = gradients.view(-1, heads, width).to(changes.dtype)
    by_query_head = torch.einsum("nhd,hsd->nhs", slopes, changes)
    return by_query_head.view(-1, kept_heads, heads // kept_heads, past).sum(dim=2)


def _linear(gradients: Sequence[torch.Tensor], graph: Graph, source: KVBuffer, layer: int) -> torch.Tensor:
    """Return the gradient of each key and value times its change, summed: [H, S]."""
    layers, past = len(graph.keys), graph.keys[layer].shape[2]
    slope_k, slope_v = gradients[layers + layer], gradients[2 * layers + layer]
    change_k = source.keys(layer)[:, :, :past] - graph.keys[layer].detach()
    change_v = source.values(layer)[:, :, :past] - graph.values[layer].detach()
    return ((slope_k * change_k).sum(dim=-1) + (slope_v * change_v).sum(dim=-1))[0]


def _head_effects(
    gradients: Sequence[torch.Tensor], watched: _Watched, head_outputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the gradient of each head's output in the last row times its change: [L, heads]."""
    effects = []
    for gradient, own, other in zip(gradients, watched.heads, head_outputs, strict=False):
        change = other.to(own) - own.detach()[0, -1].view(other.shape)
        effects.append((gradient[0, -1].view(other.shape) * change).sum(dim=-1))
    return torch.stack(effects)
