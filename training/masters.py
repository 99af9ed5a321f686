"""Float32 master copies of the trained weights, and their optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Masters:
    """Float32 master copies of bfloat16 weights. In bfloat16 itself, most small updates would be rounded away.

    Computing in bfloat16 throughout makes a step twice as fast as with a float32 adapter on a bfloat16 base.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self._weights = weights
        self.restart()

    def restart(self) -> None:
        """Start with a new optimizer and masters copied from the bfloat16 weights, all that an exported adapter has."""
        self.tensors = [nn.Parameter(weight.detach().float()) for weight in self._weights]
        self.optimizer = torch.optim.AdamW(self.tensors, weight_decay=0.0, betas=(0.9, 0.98))

    def load(self, tensors: list[torch.Tensor], optimizer: dict[str, Any]) -> None:
        for master, tensor in zip(self.tensors, tensors, strict=True):
            master.data.copy_(tensor)
        self.optimizer.load_state_dict(optimizer)
        self._publish()

    def step(self, rate: float, max_gradient_norm: float) -> bool:
        """Take an optimizer step and clear the gradients. If one is not finite, return False and leave the weights."""
        for master, weight in zip(self.tensors, self._weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        if not torch.isfinite(nn.utils.clip_grad_norm_(self.tensors, max_gradient_norm)):
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._publish()
        return True

    def _publish(self) -> None:
        with torch.no_grad():  # not through `data`, which would not update the tensor's version counter
            for master, weight in zip(self.tensors, self._weights, strict=True):
                weight.copy_(master)
