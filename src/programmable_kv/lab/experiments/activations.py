"""Activations to learn features from: policies of the training split, and plain text. No experiment scores on them.

Each text's first token is left out: its stream is some sixty times as long as any other, whatever the text is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from programmable_kv.engine import Rows
from programmable_kv.lab.tools.sites import Place, Site, recorded
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.scenarios.grammar import Scenario, make_scenario
from programmable_kv.scenarios.phrasings import PHRASINGS, Split, question
from programmable_kv.scenarios.plain_text import documents

SEED = 96_000
WINDOW = 256
"""Tokens of plain text in one prompt."""


@dataclass(frozen=True, slots=True)
class Amount:
    """The number of prompts that activations are taken from."""

    policies: int
    windows: int
    """Windows of plain text."""


def streams_before(model: Model, layer: int, amount: Amount, *, split: Split = "train") -> torch.Tensor:
    """The residual stream before a layer, [n, d] in float32 on the CPU, of every token but the first of each prompt."""
    prompts = [*policies(model, amount.policies, split), *plain(model, amount.windows, split)]
    return torch.cat([_streams(model, layer, ids) for ids in prompts])


def policies(model: Model, count: int, split: Split) -> Iterator[tuple[int, ...]]:
    """Yield policies with a question, as the chat template writes them. A longer draw starts with a shorter one."""
    for number in range(count):
        rng = random.Random(f"{SEED}/{split}/{number}")
        scenario: Scenario = make_scenario(rng, split)
        asked = question(rng, PHRASINGS[split], rng.choice(scenario.gates).topic, think=False)
        notebook = Notebook(model).message("system", scenario.prompt, **scenario.values).message("user", asked)
        yield tuple(tokenised(model.tokenizer, notebook.rendered(), Kind.PREFILL).ids)


def plain(model: Model, count: int, split: Split) -> Iterator[tuple[int, ...]]:
    """Yield windows of plain text; fewer than `count` if there is not enough text."""
    texts = documents("replay" if split == "train" else "held_out")
    found = 0
    for text in texts:
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids) - WINDOW // 4, WINDOW):
            if found == count:
                return
            found += 1
            yield tuple(ids[start : start + WINDOW])


def _streams(model: Model, layer: int, ids: Sequence[int]) -> torch.Tensor:
    engine, site = model.engine, Site(Place.RESIDUAL, layer)
    buffer = engine.new_buffer(len(ids))
    with recorded(engine, buffer, [site], range(1, len(ids))) as found:
        engine.compute(buffer, Rows.appended(ids, 0, 0), logits=0)
    return found[site].to("cpu", torch.float32)
