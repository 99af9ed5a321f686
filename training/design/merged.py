"""Linear layers with a low-rank adapter, computed as one matrix product.

The adapter is merged into a copy of the weight. peft computes the base's product, the adapter's two thin products and
their sum over all tokens, forward and backward. On a CPU these passes over memory cost more than the arithmetic. The
gradients of the two factors equal peft's, except for the rounding of the merged weight.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


class MergedLinear(Linear):  # type: ignore[misc]
    """peft's linear layer with one adapter, without dropout. The weight is merged again after an in-place change."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._whole: tuple[tuple[int, int], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        base: nn.Linear = self.get_base_layer()
        if self.disable_adapters:
            return base(x)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        down, up, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        written = down._version, up._version
        if self._whole is None or self._whole[0] != written:
            with torch.no_grad():
                change = (up.float() @ down.float()) * scale
                self._whole = written, (base.weight.float() + change).to(base.weight.dtype)
        product: torch.Tensor = _Product.apply(x, self._whole[1], base.bias, down, up, scale)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """`x @ (base + scale * up @ down).T + bias`, with gradients for `x` and the two factors only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        whole: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, whole, down, up)
        ctx.scale = scale
        return nn.functional.linear(x, whole, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, whole, down, up = ctx.saved_tensors
        gradient, x = gradients[0].flatten(0, -2), x.flatten(0, -2)
        of_down = ((gradient @ up) * ctx.scale).T @ x
        of_up = gradient.T @ ((x @ down.T) * ctx.scale)
        of_x = gradients[0] @ whole if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_down, of_up, None
