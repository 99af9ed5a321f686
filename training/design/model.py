"""The base model with the adapter that is trained: loaded, copied, and written as peft reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load(base: Path, adapter: Path, device: torch.device) -> tuple[Any, Any]:
    """The model in bfloat16, its adapter's weights as in the folder `adapter` and trainable; and its tokenizer."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="sdpa")
    # Only what decides the network: other keys of the file may be unknown to this version of peft.
    found = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    kept = {key: found[key] for key in ("r", "lora_alpha", "target_modules", "task_type")}
    model = get_peft_model(model, LoraConfig(**kept), autocast_adapter_dtype=False)
    outcome = set_peft_model_state_dict(model, load_file(adapter / WEIGHTS))
    assert not outcome.unexpected_keys, outcome.unexpected_keys[:3]
    return model.to(device).train(), AutoTokenizer.from_pretrained(base)


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The adapter's weights."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def write(model: Any, adapter: Path, out: Path) -> None:
    """The adapter's weights in bfloat16, whole or not at all, beside the configuration of the one that was continued."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model)
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}
    partial = out / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(out / WEIGHTS)
    shutil.copyfile(adapter / CONFIG, out / CONFIG)
