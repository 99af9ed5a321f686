"""Copies of a skill store with one fault each, which the plugin must show, refuse or leave to vLLM to recompute."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from programmable_kv.bench.vllm_cases import TOPICS, Shop
from programmable_kv.skills.store import SkillStore
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.prepare import certify


def wrongly_turned(shop: Shop, store: Path, target: Path) -> Path:
    """A store whose skills' `computed_at` is one position too late, so each is rotated by one position too little."""
    shutil.copytree(store, target)
    wrong = SkillStore(target)
    for skill in shop.skills.values():
        wrong.put(replace(skill, segment=replace(skill.segment, computed_at=skill.segment.computed_at + 1)))
    return target


def damaged(shop: Shop, store: Path, target: Path) -> Path:
    """A store in which one bit of every policy's tensor file is flipped."""
    shutil.copytree(store, target)
    for entry in shop.entries(TOPICS):
        file = target / entry.tensors
        body = bytearray(file.read_bytes())
        body[-7] ^= 4
        file.write_bytes(bytes(body))
    return target


def of_another_model(folder: Path, store: Path, target: Path) -> Path:
    """A store that is certified only for a model with another RoPE base."""
    other = target.with_name("other-model")
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    parameters = config.get("rope_parameters") or {"rope_type": "default"}
    config["rope_parameters"] = {**parameters, "rope_theta": 4 * float(parameters.get("rope_theta", 1e4))}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copytree(store, target, ignore=shutil.ignore_patterns("vllm-*.json"))
    certify(other, blobs_at(target))
    shutil.rmtree(other)
    return target
