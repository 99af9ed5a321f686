"""The base model with the adapter that is trained: creates, loads and writes the adapter, in peft's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from programmable_kv.cache.layout import KVLayout, Reach
from programmable_kv.errors import TrainingError
from training.design import attention as blocks

WEIGHTS, CONFIG, SUMMARY = "adapter_model.safetensors", "adapter_config.json", "training.json"


def new_adapter(base: Path, rank: int, out: Path, seed: int) -> Path:
    """Write a new adapter, which changes nothing yet, to `out` and return `out`. Works for any causal language model.

    The adapter covers all linear layers except the output layer. An adapter of the same rank in `out` is left
    unchanged.

    Raises:
        TrainingError: `out` has an adapter of another rank, or the model has layers with a window.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if (out / CONFIG).exists():
        found = json.loads((out / CONFIG).read_text(encoding="utf-8"))["r"]
        if found != rank:
            raise TrainingError(f"{out} has an adapter of rank {found}, but --rank is {rank}: choose another --out")
        return out
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    require_full_reach(model)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(out)
    return out


def require_full_reach(model: Any) -> None:
    """
    Raises:
        TrainingError: the model has layers that attend only to a window of the last tokens, which the masks do not
            support.
    """
    if any(layer.reach is not Reach.FULL for layer in KVLayout.read(model).layers):
        raise TrainingError(
            f"{model.config.model_type} has layers that attend only to a window of the last tokens, which the masks of this "
            "recipe do not support: train a model whose layers attend to the whole context"
        )


def load(base: Path, adapter: Path, device: torch.device) -> tuple[Any, Any]:
    """Load the model in bfloat16 with the trainable adapter from the folder `adapter`, and the tokenizer.

    Raises:
        TrainingError: the model has layers with a window, or the adapter is of another model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.design.merged import MergedLinear
    from training.design.whole import WholeLinear, whole_layers

    # On other devices torch's attention kernels are faster, and thin products are limited by their launches.
    lean = device.type == "cpu"
    attention = blocks.register() if lean else "sdpa"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation=attention)
    require_full_reach(model)
    # Only the keys that determine the network: this version of peft may not know other keys of the file.
    found = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    kept = {key: found[key] for key in ("r", "lora_alpha", "target_modules", "task_type")}
    config = LoraConfig(**kept)
    config._register_custom_module({torch.nn.Linear: MergedLinear if lean else WholeLinear})
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    outcome = set_peft_model_state_dict(model, load_file(adapter / WEIGHTS))
    if outcome.unexpected_keys:
        raise TrainingError(
            f"{adapter} is not an adapter of the model in {base}: it has the unexpected key {outcome.unexpected_keys[0]}"
        )
    model = model.to(device).train()
    for layer in whole_layers(model):
        layer.merge_whole()
    return model, AutoTokenizer.from_pretrained(base)


def earlier_runs(adapter: Path) -> list[dict[str, Any]]:
    """Return the summaries, without their curves, of the runs of this kind that led to an adapter, the first one first.

    Raises:
        TrainingError: the adapter's summary cannot be read.
    """
    path = adapter / SUMMARY
    if not path.exists():
        return []
    try:
        summary: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} is not the summary of a training run ({error}): restore or delete it") from error
    if "mixture" not in summary.get("recipe", {}):
        return []  # another kind of training
    own = {key: value for key, value in summary.items() if key not in ("earlier", "columns", "curve")}
    return [*summary.get("earlier", []), own]


def trained(model: Any) -> list[torch.nn.Parameter]:
    """Return the adapter's weights."""
    return [weight for name, weight in model.named_parameters() if weight.requires_grad and not name.endswith(".whole")]


def write(model: Any, adapter: Path, out: Path) -> None:
    """Write the adapter's weights in bfloat16, atomically, and copy the configuration of the initial adapter.

    Merged weights are left out.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in state.items()
        if "lora_" in name
    }
    partial = out / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(out / WEIGHTS)
    shutil.copyfile(adapter / CONFIG, out / CONFIG)
