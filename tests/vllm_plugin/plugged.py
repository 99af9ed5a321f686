"""A store with skills of a tiny model, and the plugin's two halves around a paged cache, without vLLM itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig

from conftest import tiny, tokenizer
from programmable_kv import Skill, SkillStore
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.certificate import Certificate
from programmable_kv.vllm_plugin.layout import SplitLayer
from programmable_kv.vllm_plugin.loading import HeadShare, StoredSkills
from programmable_kv.vllm_plugin.prepare import certify
from programmable_kv.vllm_plugin.scheduling import Request, Scheduling
from programmable_kv.vllm_plugin.working import Working

HEAD = "You are the support agent of a shop.\n"
REFUNDS = "refund policy: if the tier is gold refund, if silver deny. reply only with the action.\n"
RETURNS = "return policy: orders delivered before 2026 are returned.\n"
BLOCK = 16


@cache
def model_folder(root: Path) -> Path:
    """A tiny llama in the format that vLLM reads."""
    folder = root / "model"
    model = tiny()
    model.engine.model.float().save_pretrained(folder)
    model.engine.model.double()
    tokenizer("byte-level").save_pretrained(folder)
    return folder


@dataclass
class Plugged:
    """One store, one certified model, and both halves of the plugin on one worker."""

    store: SkillStore
    certificate: Certificate
    scheduling: Scheduling
    working: Working
    layers: dict[int, SplitLayer]

    def load(self, request: Request, computed: int, blocks: list[int]) -> int:
        """Do what vLLM does at admission and before the forward. Returns how many tokens were loaded."""
        count = self.scheduling.matched(request, computed)
        self.scheduling.allocated(request, computed, count, blocks)
        self.working.load(self.scheduling.drain(), dict(self.layers))
        return count

    def cached(self, layer: int, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, H, n, D] in some slots."""
        where = torch.tensor(slots)
        found = self.layers[layer].cache[where // BLOCK, :, where % BLOCK].transpose(0, 1)[None]
        keys, values = found.chunk(2, dim=-1)
        return keys, values


def plugged(root: Path, share: HeadShare | None = None, dtype: str = "float32") -> tuple[Plugged, dict[str, Skill]]:
    """The plugin and a store with two skills, for a model in that dtype."""
    store = SkillStore(root / "store")
    model, certificate = certify(model_folder(root), blobs_at(root / "store"), dtype=dtype)
    skills = {
        "refunds": store.compile(model, REFUNDS, name="refunds"),
        "returns": store.compile(model, RETURNS, name="returns"),
    }
    share = share or HeadShare()
    stored = StoredSkills(root / "store", certificate)
    layers = {}
    for number, layer in enumerate(certificate.layers):
        heads = share.of(layer.heads)
        layers[number] = SplitLayer(
            torch.zeros(12, heads.stop - heads.start, BLOCK, 2 * layer.width, dtype=getattr(torch, dtype))
        )
    working = Working(stored, BLOCK, share, torch.device("cpu"))
    return Plugged(store, certificate, Scheduling(stored, BLOCK), working, layers), skills


def with_theta(folder: Path, theta: float) -> None:
    """Turn the files into another model, by a change in its configuration."""
    config = AutoConfig.from_pretrained(folder).to_dict()
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
