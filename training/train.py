"""Train the embedded model's adapter: LoRA on generated conversations, with plain text replayed.

Run it as `pkv train adapter --out FOLDER`. It resumes from the last checkpoint in FOLDER; the data of step
`n` depends on (seed, n) alone, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from programmable_kv.errors import TrainingError
from programmable_kv.records import digest_of
from programmable_kv.scenarios.phrasings import Stage
from programmable_kv.scenarios.plain_text import documents
from training.conversation import TrainingExample, conversation, encode


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Everything that decides the adapter's weights, apart from the base model and the grammar."""

    seed: int = 20261124
    pair_steps: int = 300
    short_steps: int = 300
    mixed_steps: int = 120
    wide_steps: int = 330
    hop_steps: int = 250
    full_steps: int = 300
    topics_steps: int = 300
    full_again_steps: int = 150
    hard_steps: int = 420
    settle_steps: int = 120
    obey_steps: int = 110
    looked_up_steps: int = 100
    """steps of each `Stage` of conversations, in this order; in the last three the model is also drawn back to the base"""
    conversations_per_step: int = 8
    tokens_per_pass: int = 2048
    """padded tokens in one forward and backward; a step takes as many passes as its conversations need"""
    learning_rate: float = 5e-4
    cosine_steps: int = 1200
    """where the first cosine would end; the wide stage stops before, at about a tenth of the rate"""
    later_learning_rate: float = 5e-4
    """what a cosine of its own starts from at the hop, the topics and the hard stage, with a fresh optimizer"""
    settle_learning_rate: float = 3e-4
    obey_learning_rate: float = 5e-4
    warmup_steps: int = 20
    lora_rank: int = 16
    lora_alpha: int = 32
    replay_tokens: int = 128
    """tokens of plain text replayed in each step"""
    replay_weight: float = 0.6
    settle_replay_tokens: int = 512
    """in the last three stages"""
    settle_replay_weight: float = 4.0
    obey_replay_weight: float = 1.5
    """at the end the replayed text is not learned: the adapted model's distribution over it is drawn to the base's. Learned
    for thousands of steps, these few documents are remembered word for word, and other text becomes less likely."""
    max_gradient_norm: float = 1.0
    last_stage_share: float = 0.5
    """what is exported is the mean of the weights before and after the last stage, the latter counting so much (weights of one
    run averaged: Izmailov et al. 2018, https://arxiv.org/abs/1803.05407)"""

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self._stages)

    @property
    def fresh_starts(self) -> tuple[int, ...]:
        """The steps, after the first, at which a new cosine and a new optimizer begin."""
        second = self.pair_steps + self.short_steps + self.mixed_steps + self.wide_steps
        third = second + self.hop_steps + self.full_steps
        fourth = third + self.topics_steps + self.full_again_steps
        settling = fourth + self.hard_steps
        obeying = settling + self.settle_steps
        return second, third, fourth, settling, obeying, obeying + self.obey_steps

    def divergence_weight(self, step: int) -> float | None:
        """What the divergence from the base on plain text counts in this step; None where plain text is learned instead."""
        obey = self.obey_replay_weight
        return {"settle": self.settle_replay_weight, "obey": obey, "looked_up": obey}.get(self.stage(step))

    @property
    def _stages(self) -> tuple[tuple[Stage, int], ...]:
        return (
            ("pair", self.pair_steps), ("short", self.short_steps), ("mixed", self.mixed_steps),
            ("wide", self.wide_steps), ("hop", self.hop_steps), ("full", self.full_steps),
            ("topics", self.topics_steps), ("full", self.full_again_steps), ("hard", self.hard_steps),
            ("settle", self.settle_steps), ("obey", self.obey_steps), ("looked_up", self.looked_up_steps),
        )  # fmt: skip

    def stage(self, step: int) -> Stage:
        end = 0
        for name, steps in self._stages:
            end += steps
            if step < end:
                return name
        return "full"

    def rate(self, step: int) -> float:
        """Seven cosines towards a twentieth, each after a linear warm-up."""
        starts = [0, *self.fresh_starts]
        start = max(start for start in starts if start <= step)
        if start == 0:
            peak, whole = self.learning_rate, self.cosine_steps
        else:
            obey = self.obey_learning_rate
            own = {"settle": self.settle_learning_rate, "obey": obey, "looked_up": obey}
            peak = own.get(self.stage(step), self.later_learning_rate)
            whole = min(s for s in [*starts, self.steps] if s > start) - start
        done = step - start
        if done < self.warmup_steps:
            return peak * (done + 1) / self.warmup_steps
        progress = (done - self.warmup_steps) / (whole - self.warmup_steps)
        return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    base: Path,
    out: Path,
    recipe: TrainingRecipe,
    *,
    stop_after: int | None = None,
    change_recipe: bool = False,
    report: Callable[[int, float, float], None] | None = None,
) -> Path:
    """Train (or resume training) the adapter of the model in `base`; returns the folder with its weights.

    `stop_after` ends it at that step of the recipe's schedule. With `change_recipe` it may go on from a checkpoint of another
    recipe; which recipe was followed up to which step is recorded.

    `report(step, decision_loss, replay_loss)` is called after every step. Losses are in nats a token; in the settling steps
    the second one is the divergence from the base on the replayed text.
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
                    f"{checkpoint} was written by another recipe. Choose another folder, delete it, or change the recipe "
                    "from here on."
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
        learned = sum(sum(sequence.learned) for sequence in drawn)
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
        """A fresh optimizer on the bfloat16 weights as they are, which is all that an exported adapter holds."""
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
    """Go on from an exported adapter: its step, seconds, curve, and the recipes it followed if they were others.

    Only where a new cosine begins is the optimizer's state not needed.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if found["step"] not in recipe.fresh_starts:
        raise TrainingError(
            f"{folder} holds an adapter exported at step {found['step']}; without its checkpoint.pt training can only "
            f"go on from steps {recipe.fresh_starts}. Choose an empty folder to train from the start."
        )
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    earlier = list(found.get("earlier", []))
    if found["recipe"] != asdict(recipe):
        earlier.append({"until_step": found["step"], "recipe": found["recipe"]})
    return found["step"], found["seconds"], found["curve"], earlier


def _width(sequences: list[TrainingExample]) -> int:
    """Padded length. Few distinct widths let the CPU's matrix kernels be prepared once and reused."""
    return math.ceil(max(len(sequence.ids) for sequence in sequences) / 64) * 64


def _passes(drawn: list[TrainingExample], tokens: int) -> list[list[TrainingExample]]:
    """Sequences of like lengths together, each batch at most `tokens` padded tokens (or one sequence)."""
    batches: list[list[TrainingExample]] = []
    for sequence in sorted(drawn, key=lambda sequence: len(sequence.ids)):
        if batches and _width([*batches[-1], sequence]) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def _summed_loss(model: Any, batch: list[TrainingExample]) -> torch.Tensor:
    """Cross entropy summed over the learned tokens. The vocabulary projection runs on those rows only.

    Padding is on the right, where a causal model's real tokens never look, so no mask is needed.
    """
    width = _width(batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        learned[row, : len(sequence.ids)] = torch.tensor(sequence.learned)
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
