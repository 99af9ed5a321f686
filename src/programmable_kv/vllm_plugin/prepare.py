"""Preparation, done once where the library can load the model: certify, export, compile a conversation's opening."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from programmable_kv.cache.rotation import Rotary
from programmable_kv.errors import InvalidArgumentError, UnsupportedModelError
from programmable_kv.models.load import Model, load_model
from programmable_kv.models.quiet import quiet_transformers
from programmable_kv.models.source import find_source
from programmable_kv.prompt.chat import opened
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.skills.draft import Draft
from programmable_kv.skills.skill import Skill, compute_drafts
from programmable_kv.storage.files import Blobs
from programmable_kv.storage.tensors import cached_shapes
from programmable_kv.vllm_plugin.certificate import Certificate, SavedLayer, SavedRotary, files_of


def certify(name: str | Path, blobs: Blobs, *, dtype: str = "float32") -> tuple[Model, Certificate]:
    """Load a model, prove that its keys can be relocated, and write its certificate to the skill store. Returns both.

    Args:
        name: a folder that vLLM serves, or "embedded".
        dtype: the dtype in which vLLM serves the model.

    Raises:
        InvalidArgumentError: the model is not in a folder.
        ModelUnavailableError: vLLM cannot read the folder.
        UnverifiedError: relocation of the model's keys is not proved.
        UnsupportedModelError: the keys and values that the model caches cannot be written into vLLM's cache unchanged.
        StorageError: the store cannot be written.
    """
    source = find_source(name)
    if source.folder is None or source.gguf_file is not None:
        raise InvalidArgumentError(
            f"'{name}' is not a folder with config.json and .safetensors weights. `pkv vllm export {name} FOLDER` writes one."
        )
    files = files_of(source.folder)
    model = load_model(name, dtype=dtype)
    certificate = _certificate(model, files)
    certificate.write(blobs)
    return model, certificate


def _certificate(model: Model, files: dict[str, str]) -> Certificate:
    layout = model.engine.require_relocation()
    rotations: list[Rotary] = []
    layers = []
    for number, (rule, shape) in enumerate(zip(layout.layers, cached_shapes(model.engine), strict=True)):
        keys, values = shape["keys"], shape["values"]
        if rule.rotated != "keys" or rule.others or keys != values:
            raise UnsupportedModelError(
                f"layer {number} of {layout.model_type} caches keys of {keys.heads} x {keys.width} and values of "
                f"{values.heads} x {values.width}. vLLM's cache needs equal shapes, and the connector rotates keys only."
            )
        if rule.rotary is not None and rule.rotary.axes:
            raise UnsupportedModelError(
                f"{layout.model_type} rotates keys along several axes, but the plugin supports only one axis"
            )
        if rule.rotary is not None and rule.rotary not in rotations:
            rotations.append(rule.rotary)
        turned = None if rule.rotary is None else rotations.index(rule.rotary)
        layers.append(SavedLayer(heads=keys.heads, width=keys.width, rotation=turned))
    return Certificate(
        model_name=model.name,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        files=files,
        layers=tuple(layers),
        rotations=tuple(map(SavedRotary.of, rotations)),
        position_limit=model.position_limit,
    )


def compile_opening(model: Model, messages: Sequence[tuple[str, str]], *, name: str = "opening") -> Skill:
    """Compile a conversation's beginning as a skill: the template's tokens and the messages, the last one left open.

    At the start of a prompt it is exact. With it in the store, a prompt can be loaded from its first token on.

    Raises:
        TemplateError: the chat template does not accept the messages.
        ContextOverflowError: the opening has more tokens than the model has positions.
    """
    unit = tokenised(model.tokenizer, Rendered(opened(model.tokenizer, list(messages), inside=True)), Kind.SKILL)
    return compute_drafts(model, [Draft(name, unit, {}, "", ())])[0]


def export(name: str | Path, folder: str | Path, *, dtype: str = "bfloat16") -> Path:
    """Write a model to a folder that vLLM can serve, and return the folder. A GGUF file, for example, is dequantised.

    Raises:
        InvalidArgumentError: the folder is not empty.
        ModelUnavailableError: the model cannot be loaded.
    """
    target = Path(folder).expanduser()
    if target.exists() and any(target.iterdir()):
        raise InvalidArgumentError(f"{target} is not empty: give a new folder")
    loaded = load_model(name, dtype=dtype, attention="sdpa")
    from transformers import AutoModelForCausalLM

    config = loaded.engine.model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers refuses to save a model that was loaded from GGUF, so the weights are copied into a plain model.
    with quiet_transformers():
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        plain.load_state_dict(loaded.engine.model.state_dict())
        plain.save_pretrained(target)
        loaded.tokenizer.save_pretrained(target)
    return target
