"""Linear layers whose adapter is merged into a weight that receives a whole gradient.

On a GPU the adapter's thin products take as long as the wide ones, because they are limited by memory and launches.
Here a forward and a backward are those of a plain linear layer. After the backward, the factors' gradients follow from
the weight's: with W = base + s * up @ down, the gradient of `up` is s * G @ down.T and that of `down` is s * up.T @ G,
if G is the gradient of W. On an H200 a step took about 0.6 of the time with peft's layers. (torch.compile of the
decoder layers made it no faster.)
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


class WholeLinear(Linear):  # type: ignore[misc]
    """peft's linear layer with one adapter, without dropout, computed with one weight."""

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        base: nn.Linear = self.get_base_layer()
        weight = base.weight if self.disable_adapters else self.whole
        return nn.functional.linear(x, weight, base.bias)

    @torch.no_grad()
    def merge_whole(self) -> None:
        """Set the weight to the base's plus the adapter's."""
        base, down, up, scale = self._factors()
        merged = (base.weight.float() + (up.float() @ down.float()) * scale).to(base.weight.dtype)
        if not hasattr(self, "whole"):
            self.whole = nn.Parameter(merged)
        else:
            self.whole.copy_(merged)

    @torch.no_grad()
    def fold_gradient(self) -> None:
        """Turn the weight's gradient into those of the two factors."""
        _, down, up, scale = self._factors()
        gradient = self.whole.grad
        assert gradient is not None
        gradient, self.whole.grad = gradient.float(), None
        up.grad = ((gradient @ down.float().T) * scale).to(up.dtype)
        down.grad = ((up.float().T @ gradient) * scale).to(down.dtype)

    def _factors(self) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, float]:
        (name,) = self.active_adapters
        return self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]


def whole_layers(model: nn.Module) -> list[WholeLinear]:
    """Return the layers of a model that compute in this way."""
    return [module for module in model.modules() if isinstance(module, WholeLinear)]
