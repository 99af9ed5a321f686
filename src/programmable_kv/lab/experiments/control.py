"""The control that every finding has to beat: the same architecture with the same weights in random places."""

from __future__ import annotations

import copy

import torch

from programmable_kv.models.load import Model, wrap_model

RANDOM_WEIGHTS = "random weights"


def randomised(model: Model, seed: int = 0) -> Model:
    """A model with the entries of every weight matrix shuffled within it (seeded). Norms and biases are unchanged.

    The weights then have the sizes that training gave them, but the computation is not the trained one. Source: Heap et
    al., Sparse Autoencoders Can Interpret Randomly Initialized Transformers (arXiv 2501.17727), section 3.
    """
    shuffled = copy.deepcopy(model.engine.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return wrap_model(shuffled.eval(), model.tokenizer, name=RANDOM_WEIGHTS)
