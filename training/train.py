"""Train the embedded model's adapter: LoRA on generated conversations, with plain text replayed.

Run it as `python -m training.adapter --out FOLDER`. It resumes from the last checkpoint in FOLDER; the data of step
`n` depends on (seed, n) alone, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from programmable_kv.errors import TrainingError
from programmable_kv.records import digest_of
from programmable_kv.scenarios.plain_text import documents
from training.conversation import TrainingExample, conversation, encode
from training.recipe import TrainingRecipe


def train(
    base: Path,
    out: Path,
    recipe: TrainingRecipe,
    *,
    stop_after: int | None = None,
    change_recipe: bool = False,
    report: Callable[[int, float, float], None] | None = None,
) -> Path:
    """Train (or resume training) the adapter of the model in `base`.

    Args:
        base: a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.
        out: where checkpoints and the result go. A checkpoint there is resumed.
        stop_after: stop at this step of the recipe's schedule.
        change_recipe: continue from a checkpoint of another recipe. Which recipe was followed up to which step is recorded.
        report: called as `report(step, decision_loss, replay_loss)` after every step. Losses are in nats a token; in the
            last three stages the second one is the divergence from the base on the replayed text.

    Returns:
        The folder with the adapter's weights, its configuration and `training.json`.

    Raises:
        TrainingError: the folder holds a checkpoint of another recipe, or an exported adapter that cannot be resumed.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, _lora(recipe, LoraConfig), autocast_adapter_dtype=False)
    model.train()
    weights = Masters([p for p in model.parameters() if p.requires_grad])

    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    start, seconds = 0, 0.0
    curve: list[Any] = []
    earlier: list[dict[str, Any]] = []
    before_last: dict[str, torch.Tensor] | None = None
    if not checkpoint.exists() and (out / "training.json").exists():
        start, seconds, curve, earlier = _load_exported(out, model, recipe)
        weights.restart()
    elif checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        earlier, before_last = state["earlier"], state.get("before_last")  # an older recipe's checkpoint has none
        if state["recipe"] != asdict(recipe):
            if not change_recipe:
                raise TrainingError(
                    f"{checkpoint} was written by another recipe. Choose another folder, delete it, or continue with "
                    "the new recipe (`--change-recipe`)."
                )
            earlier = [*earlier, {"until_step": state["step"], "recipe": state["recipe"]}]
        weights.load(state["masters"], state["optimizer"])
        start, seconds, curve = state["step"], state["seconds"], state["curve"]

    replay_ids = [tokenizer.encode(text, add_special_tokens=False) for text in documents("replay")]
    plain = documents("replay", 200, packages=True)
    began = time.perf_counter() - seconds
    last = min(recipe.steps, stop_after or recipe.steps)
    for step in range(start, last):
        if step in recipe.fresh_starts:
            weights.restart()
        if step == recipe.fresh_starts[-1]:
            before_last = _adapter_of(model)
        rng = random.Random(f"{recipe.seed}/{step}")
        stage = recipe.stage(step)
        drawn = [encode(conversation(rng, stage=stage), tokenizer) for _ in range(recipe.conversations_per_step)]
        learned = sum(sum(example.learned) for example in drawn)
        decision_loss = 0.0
        for batch in _passes(drawn, recipe.tokens_per_pass):
            loss = _summed_loss(model, batch) / learned
            loss.backward()  # type: ignore[no-untyped-call]
            decision_loss += float(loss.detach())
        divergence_weight = recipe.divergence_weight(step)
        if divergence_weight is not None:
            shuffled = "\n\n".join(rng.sample(plain, k=8))
            ids = tokenizer.encode(shuffled, add_special_tokens=False)[: recipe.settle_replay_tokens]
            replay_loss, weight = _distance_from_base(model, ids), divergence_weight
        else:
            text = _replay(rng, replay_ids, recipe.replay_tokens)
            replay_loss, weight = _summed_loss(model, [text]) / len(text.ids), recipe.replay_weight
        (weight * replay_loss).backward()  # type: ignore[no-untyped-call]
        weights.step(recipe.rate(step), recipe.max_gradient_norm)
        curve.append([step, round(decision_loss, 4), round(float(replay_loss.detach()), 4)])
        if report is not None:
            report(step, decision_loss, float(replay_loss.detach()))
        if (step + 1) % 20 == 0 or step + 1 == last:
            state = {
                "adapter": _adapter_of(model),
                "before_last": before_last,
                "masters": [tensor.data for tensor in weights.tensors],
                "optimizer": weights.optimizer.state_dict(),
                "recipe": asdict(recipe),
                "step": step + 1,
                "seconds": time.perf_counter() - began,
                "curve": curve,
                "earlier": earlier,
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
    return export(checkpoint, out)


class Masters:
    """Float32 masters of bfloat16 weights: a bfloat16 weight would swallow most of its own small updates.

    Computing in bfloat16 throughout makes a step twice as fast as a float32 adapter on a bfloat16 base.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self._weights = weights
        self.restart()

    def restart(self) -> None:
        """A fresh optimizer on the bfloat16 weights: an exported adapter holds nothing more."""
        self.tensors = [nn.Parameter(weight.detach().float()) for weight in self._weights]
        self.optimizer = torch.optim.AdamW(self.tensors, weight_decay=0.0, betas=(0.9, 0.98))

    def load(self, tensors: list[torch.Tensor], optimizer: dict[str, Any]) -> None:
        for master, tensor in zip(self.tensors, tensors, strict=True):
            master.data.copy_(tensor)
        self.optimizer.load_state_dict(optimizer)
        self._publish()

    def step(self, rate: float, max_gradient_norm: float) -> None:
        for master, weight in zip(self.tensors, self._weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.tensors, max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._publish()

    def _publish(self) -> None:
        for master, weight in zip(self.tensors, self._weights, strict=True):
            weight.data.copy_(master.data)


def _load_exported(
    folder: Path, model: Any, recipe: TrainingRecipe
) -> tuple[int, float, list[Any], list[dict[str, Any]]]:
    """Continue from an exported adapter: its step, seconds, curve, and the other recipes that it followed.

    This works only where a new cosine begins: elsewhere the optimizer's state is needed, which is not exported.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if found["step"] not in recipe.fresh_starts:
        raise TrainingError(
            f"{folder} holds an adapter exported at step {found['step']}; without its checkpoint.pt training can only "
            f"continue from steps {recipe.fresh_starts}. Choose an empty folder to train from the start."
        )
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    earlier = list(found.get("earlier", []))
    if found["recipe"] != asdict(recipe):
        earlier.append({"until_step": found["step"], "recipe": found["recipe"]})
    return found["step"], found["seconds"], found["curve"], earlier


def _width(examples: list[TrainingExample]) -> int:
    """Padded length. Few distinct widths let the CPU's matrix kernels be prepared once and reused."""
    return math.ceil(max(len(example.ids) for example in examples) / 64) * 64


def _passes(drawn: list[TrainingExample], tokens: int) -> list[list[TrainingExample]]:
    """Examples of similar lengths together, each batch at most `tokens` padded tokens (or one sequence)."""
    batches: list[list[TrainingExample]] = []
    for example in sorted(drawn, key=lambda example: len(example.ids)):
        if batches and _width([*batches[-1], example]) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def _summed_loss(model: Any, batch: list[TrainingExample]) -> torch.Tensor:
    """Cross entropy summed over the learned tokens. The vocabulary projection runs on those rows only.

    Padding is on the right, where a causal model's real tokens never look, so no mask is needed.
    """
    width = _width(batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        learned[row, : len(example.ids)] = torch.tensor(example.learned)
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state
    rows = learned[:, 1:]
    logits = causal_lm.lm_head(hidden[:, :-1][rows]).float()
    return nn.functional.cross_entropy(logits, ids[:, 1:][rows], reduction="sum")


def _distance_from_base(model: Any, text: list[int]) -> torch.Tensor:
    """Kullback-Leibler divergence of the adapted model's next-token distributions from the base's, mean over a text."""
    ids = torch.tensor([text])
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    adapted = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return nn.functional.kl_div(adapted, base, log_target=True, reduction="batchmean")


def _replay(rng: random.Random, documents_ids: list[list[int]], tokens: int) -> TrainingExample:
    ids = rng.choice(documents_ids)
    start = rng.randint(0, max(0, len(ids) - tokens))
    cut = ids[start : start + tokens]
    return TrainingExample(cut, [True] * len(cut))


def _adapter_of(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def export(checkpoint: Path, out: Path) -> Path:
    """Write a checkpoint's adapter as peft reads it (bfloat16), and `training.json` with recipe and loss curve.

    From within the last stage it is the mean that `TrainingRecipe.last_stage_share` speaks of.
    """
    from peft import LoraConfig
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
    _lora(recipe, LoraConfig).save_pretrained(out)
    summary = {key: state[key] for key in ("recipe", "earlier", "step", "seconds")}
    # The replayed text and the English words of the grammar are the running Python's standard library.
    texts = (*documents("replay"), *documents("replay", 200, packages=True))
    summary |= {"python": platform.python_version(), "text_digest": digest_of(texts)}
    curve = {"columns": ["step", "decision_loss", "replay_loss"], "curve": state["curve"]}
    (out / "training.json").write_text(json.dumps({**summary, **curve}) + "\n", encoding="utf-8")
    return out


_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _lora(recipe: TrainingRecipe, config: Any) -> Any:
    return config(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=_TARGETS, task_type="CAUSAL_LM",
        base_model_name_or_path="SmolLM2-135M-Instruct",
    )  # fmt: skip
