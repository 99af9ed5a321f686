"""First-order attribution: which cached rows, and which heads, would move a decision if they were the other context's?

One forward and one backward rank every (layer, KV head, slot) at once; the exact effect is then computed for the first of the
ranking only. What is first-order is the effect of a layer's attention output on the decision. What a patch does to that output
is exact: the softmax is computed anew, as a saturated one hides what a gradient through it would miss.

With `drop`, one more gradient for each layer: in each, no gradient passes through what one layer adds, and the score is the
mean of the absolute effects. An effect that another one cancels shows then.
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
"""logits of the last row [vocabulary] -> the number that is to be explained (a gap)"""


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """Estimated effects on the target."""

    rows: torch.Tensor
    """[L, H, S] of patching a slot's key and value in one layer and KV head (with `drop`, without sign)"""
    linear: torch.Tensor
    """[L, H, S] of the same by plain gradients: kept for comparison"""
    heads: torch.Tensor | None
    """[L, query heads] of patching a head's output in the last row; None without `head_outputs`"""

    def by_slot(self) -> torch.Tensor:
        """[S]: a slot in all layers and heads."""
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
    """Attribute to every cached row what it would do to the target, if it were the source's.

    Args:
        source: the other context; its slots stand at the same positions.
        rows: what is appended to be computed; the last row decides.
        head_outputs: of the source's last row, in each layer, [heads, D_v] (`recorded` gives them).

    The buffer is unchanged.

    Raises:
        InvalidArgumentError: the two contexts do not have the same slots.
        UnsupportedModelError: the model's cached keys and values are not those of its attention (MLA).
    """
    past = buffer.length
    if source.length < past or not torch.equal(source.positions[:past], buffer.positions):
        raise InvalidArgumentError("the two contexts must have the same slots at the same positions")
    layers = len(buffer)
    if any(layer.rotated != "keys" for layer in engine.relocation.layout.layers):
        raise UnsupportedModelError(f"{engine.layout.model_type} caches something else than its attention reads (MLA)")
    with _watched(engine, buffer) as watched, engine.graph(buffer, rows) as graph:
        if graph.last[0].query.shape[-1] != graph.keys[0].shape[-1]:
            raise UnsupportedModelError(
                f"{engine.layout.model_type} caches something else than its attention reads (MLA)"
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
        # A layer that is dropped shows no effect of its own, so each layer's mean is over the others.
        slopes = _dropped(engine, buffer, rows, target)
        every = [_effects(g, c, kept).abs().sum(dim=0) for g, c in zip(slopes, changes, strict=True)]
        by_row = torch.stack(every) / max(1, layers - 1)
    return Attribution(by_row, linear, heads)


def _dropped(engine: Engine, buffer: KVBuffer, rows: Rows, target: Target) -> list[torch.Tensor]:
    """The gradients [dropped layers, heads * D_v] of each layer's heads in the last row, one layer after the other dropped.

    All in one forward and one backward: for each dropped layer a copy of the rows, through which no gradient passes there.
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
    """the input of each layer's output projection, [1, T, heads * D_v]"""


@contextmanager
def _watched(engine: Engine, buffer: KVBuffer, *, copies: int = 0) -> Iterator[_Watched]:
    """Keep the heads' outputs of this buffer's forward; of copies of rows, let no gradient pass what layer i adds in copy i."""
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
    """What patching each slot alone does to what the last row's heads read: [heads, S, D_v]. Exact.

    Without slot p, a head reads the others with a total weight of e^l. With a new score s and value v it reads
    u v + (1 - u) (the others), where u = sigmoid(s - l). No weight is divided out of a softmax in which it is nearly all.
    """
    last: LastRow = graph.last[layer]
    kept, past = graph.keys[layer].shape[1:3]
    groups, compute = last.scores.shape[0] // kept, last.scores.dtype

    def by_query_head(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0].repeat_interleave(groups, dim=0).to(compute)

    values = by_query_head(graph.read[layer])
    others, read_others, read = _without_each(last.scores, values, past)
    scores = [_scores(last, by_query_head(keys)) for keys in (graph.keys[layer], source.keys(layer)[:, :, :past])]
    # What else was added to a score (a bias by position) stays.
    now = last.scores[:, :past] + scores[1] - scores[0]
    share = torch.sigmoid(now - others)[..., None]
    changed = share * by_query_head(source.values(layer)[:, :, :past]) + (1 - share) * read_others
    return torch.where(last.scores[:, :past, None].isfinite(), changed - read[:, None], 0.0)


def _without_each(
    scores: torch.Tensor, values: torch.Tensor, past: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each of the first `past` slots, the log of the others' total weight [heads, S] and what is read of them
    [heads, S, D_v]; and what is read of all, [heads, D_v].
    """
    weights = scores.softmax(dim=-1)
    read = (weights[:, None] @ values)[:, 0]
    own = weights[:, :past]
    total = torch.logsumexp(scores, dim=-1, keepdim=True) + torch.log1p(-own.clamp_max(0.5))
    others = (read[:, None] - own[..., None] * values[:, :past]) / (1 - own.clamp_max(0.5))[..., None]
    # At most one slot of a head has more than half of its weight. There the difference would cancel.
    for head, slot in (own > 0.5).nonzero().tolist():
        rest = scores[head].clone()
        rest[slot] = float("-inf")
        total[head, slot] = torch.logsumexp(rest, dim=-1)
        others[head, slot] = rest.softmax(dim=-1).nan_to_num() @ values[head]
    return total, others, read


def _scores(last: LastRow, keys: torch.Tensor) -> torch.Tensor:
    """The last row's scores of keys [heads, S, D]: [heads, S]."""
    scores = (keys @ last.query.to(keys.dtype)[:, :, None])[..., 0] * last.scaling
    return scores if last.softcap is None else torch.tanh(scores / last.softcap) * last.softcap


def _effects(gradients: torch.Tensor, changes: torch.Tensor, kept_heads: int) -> torch.Tensor:
    """[n, H, S] effects by KV head, from gradients [n, heads * D_v] and changes [heads, S, D_v] of the last row."""
    heads, past, width = changes.shape
    slopes = gradients.view(-1, heads, width).to(changes.dtype)
    by_query_head = torch.einsum("nhd,hsd->nhs", slopes, changes)
    return by_query_head.view(-1, kept_heads, heads // kept_heads, past).sum(dim=2)


def _linear(gradients: Sequence[torch.Tensor], graph: Graph, source: KVBuffer, layer: int) -> torch.Tensor:
    """[H, S]: the gradient of each key and value times its change."""
    layers, past = len(graph.keys), graph.keys[layer].shape[2]
    slope_k, slope_v = gradients[layers + layer], gradients[2 * layers + layer]
    change_k = source.keys(layer)[:, :, :past] - graph.keys[layer].detach()
    change_v = source.values(layer)[:, :, :past] - graph.values[layer].detach()
    return ((slope_k * change_k).sum(dim=-1) + (slope_v * change_v).sum(dim=-1))[0]


def _head_effects(
    gradients: Sequence[torch.Tensor], watched: _Watched, head_outputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """[L, heads]: the gradient of each head's output in the last row times its change."""
    effects = []
    for gradient, own, other in zip(gradients, watched.heads, head_outputs, strict=False):
        change = other.to(own) - own.detach()[0, -1].view(other.shape)
        effects.append((gradient[0, -1].view(other.shape) * change).sum(dim=-1))
    return torch.stack(effects)
