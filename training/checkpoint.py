"""Checkpoints of a training run: resume from a folder, save to it, and export an adapter."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from programmable_kv.errors import TrainingError
from programmable_kv.records import digest_of
from programmable_kv.scenarios.plain_text import documents
from training.masters import Masters
from training.recipe import TrainingRecipe

CHECKPOINT = "checkpoint.pt"
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(slots=True)
class Progress:
    """The state of a run, apart from its weights and optimizer, that is needed to continue it."""

    step: int = 0
    """steps done"""
    seconds: float = 0.0
    curve: list[Any] = field(default_factory=list)
    """[step, decision loss, replay loss] of every step"""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """recipes that were followed before this one, each with its last step"""
    before_last: dict[str, torch.Tensor] | None = None
    """the adapter before the last stage, once the last stage has begun"""


def resume(out: Path, model: Any, masters: Masters, recipe: TrainingRecipe, *, change_recipe: bool) -> Progress:
    """Load a folder's checkpoint into the model and its masters, or else its exported adapter, or else nothing.

    Raises:
        TrainingError: the checkpoint has another recipe, or the adapter was exported at a step that cannot be resumed.
    """
    checkpoint = out / CHECKPOINT
    if not checkpoint.exists():
        exported = (out / "training.json").exists()
        return _from_exported(out, model, masters, recipe) if exported else Progress()
    state = torch.load(checkpoint, weights_only=True)
    earlier = state["earlier"]
    if state["recipe"] != asdict(recipe):
        if not change_recipe:
            raise TrainingError(
                f"{checkpoint} was written by another recipe. Choose another folder, delete it, or continue with the new "
                "recipe (`--change-recipe`)."
            )
        earlier = [*earlier, {"until_step": state["step"], "recipe": state["recipe"]}]
    masters.load(state["masters"], state["optimizer"])
    # Checkpoints of a recipe without a last stage have no `before_last`.
    return Progress(state["step"], state["seconds"], state["curve"], earlier, state.get("before_last"))


def _from_exported(folder: Path, model: Any, masters: Masters, recipe: TrainingRecipe) -> Progress:
    """Continue from an exported adapter.

    This works only at a step where a new cosine begins. Elsewhere the optimizer's state is needed, which is not
    exported.

    Raises:
        TrainingError: no new cosine begins at the exported step.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if found["step"] not in recipe.fresh_starts:
        raise TrainingError(
            f"{folder} contains an adapter exported at step {found['step']}; without its checkpoint.pt, training can only "
            f"continue from steps {recipe.fresh_starts}. Choose an empty folder to train from the start."
        )
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    earlier = list(found.get("earlier", []))
    if found["recipe"] != asdict(recipe):
        earlier.append({"until_step": found["step"], "recipe": found["recipe"]})
    masters.restart()
    return Progress(found["step"], found["seconds"], found["curve"], earlier)


def save(out: Path, model: Any, masters: Masters, recipe: TrainingRecipe, progress: Progress) -> None:
    """Write the checkpoint atomically."""
    state = {
        "adapter": adapter_of(model),
        "before_last": progress.before_last,
        "masters": [tensor.data for tensor in masters.tensors],
        "optimizer": masters.optimizer.state_dict(),
        "recipe": asdict(recipe),
        "step": progress.step,
        "seconds": progress.seconds,
        "curve": progress.curve,
        "earlier": progress.earlier,
    }
    checkpoint = out / CHECKPOINT
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def export(checkpoint: Path, out: Path) -> Path:
    """Write a checkpoint's adapter in peft's format (bfloat16), and `training.json` with the recipe and the loss curve.

    In the last stage, the exported weights are the mean that `TrainingRecipe.last_stage_share` describes.
    """
    from safetensors.torch import save_file

    state = torch.load(checkpoint, weights_only=True)
    out.mkdir(parents=True, exist_ok=True)
    recipe = TrainingRecipe(**state["recipe"])
    adapter: dict[str, torch.Tensor] = state["adapter"]
    if state["before_last"] is not None:
        earlier, share = state["before_last"], recipe.last_stage_share
        adapter = {name: torch.lerp(earlier[name].float(), tensor.float(), share) for name, tensor in adapter.items()}
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in adapter.items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    lora_config(recipe).save_pretrained(out)
    summary = {key: state[key] for key in ("recipe", "earlier", "step", "seconds")}
    # The replayed text and the grammar's English words come from the running Python's standard library.
    texts = (*documents("replay"), *documents("replay", 200, packages=True))
    summary |= {"python": platform.python_version(), "text_digest": digest_of(texts)}
    curve = {"columns": ["step", "decision_loss", "replay_loss"], "curve": state["curve"]}
    (out / "training.json").write_text(json.dumps({**summary, **curve}) + "\n", encoding="utf-8")
    return out


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's weights."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def lora_config(recipe: TrainingRecipe) -> Any:
    """Return peft's configuration of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=_TARGETS, task_type="CAUSAL_LM",
        base_model_name_or_path="SmolLM2-135M-Instruct",
    )  # fmt: skip
