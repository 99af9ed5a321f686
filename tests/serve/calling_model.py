"""A tiny model, trained on a few prompts to call a tool, so that tests get calls from a model with a real template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from programmable_kv import Model, Notebook
from programmable_kv.bench.tiny_chat import tiny_chat_model

QWEN = (Path(__file__).parents[1] / "templates" / "qwen25.jinja").read_text(encoding="utf-8")
SAID = "Let me look.\n"
CALL = '<tool_call>\n{"name": "look", "arguments": {"shelf": "A1"}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a shelf.",
        "parameters": {"type": "object", "properties": {"shelf": {"type": "string"}}, "required": ["shelf"]},
    },
}
_OPENING = "<|im_start|>assistant\n"


def templated(template: str = QWEN) -> Model:
    """An untrained model with a chat template."""
    model = tiny_chat_model(2048)
    model.tokenizer.chat_template = template
    return model


def taught(lessons: Sequence[tuple[Sequence[dict[str, Any]], str]], tools: Sequence[dict[str, Any]]) -> Model:
    """A model that generates the given answer to each conversation under greedy decoding."""
    model = templated()
    network: Any = model.engine.model
    rows = []
    for messages, said in lessons:
        prompt = Notebook.from_messages(model, messages, tools=tools).rendered().text + _OPENING
        before = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = model.tokenizer(f"{said}<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append((torch.tensor([[*before, *after]]), len(before)))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(400):
            loss = sum(
                torch.nn.functional.cross_entropy(network(ids).logits[0, start - 1 : -1], ids[0, start:])
                for ids, start in rows
            )
            if float(loss.detach()) < 0.02:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert float(loss.detach()) < 0.1, f"it did not learn its answers (loss {float(loss.detach()):.2f})"
    return model
