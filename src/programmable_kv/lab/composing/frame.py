"""The text around spliced pieces: in the system area or inside the conversation, after a given amount of other text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from programmable_kv.demo.demo import policy
from programmable_kv.errors import TemplateError
from programmable_kv.models.load import Model
from programmable_kv.scenarios.phrasings import FILLERS

Area = Literal["system", "conversation"]
TITLE = "House rules:\n"
_PIECES, _REQUEST = "\ue006", "\ue007"
_SEED = 55_000


@dataclass(frozen=True, slots=True)
class InsertionPoint:
    """Where pieces are spliced in: the area of the prompt, and the least number of tokens of other text before them."""

    area: Area
    preceding_tokens: int

    def __str__(self) -> str:
        return f"{self.area}_{self.preceding_tokens}"


@dataclass(frozen=True, slots=True)
class Frame:
    """The tokens before the pieces (`before`), and the text between them and the request, and after the request."""

    before: list[int]
    _between: str
    _end: str

    def after(self, request: str) -> str:
        """The text from the last piece to the start of the answer."""
        return self._between + request + self._end


def frame_at(model: Model, point: InsertionPoint) -> Frame:
    """The text around an insertion point, from the chat template or, if the model has none, as a plain dialogue.

    Raises:
        TemplateError: the chat template does not render every message once.
    """
    lines = other_lines()
    count = 0
    while True:
        before, between, end = _cut(_render(model, point.area, "\n".join(lines[i % len(lines)] for i in range(count))))
        ids: list[int] = model.tokenizer.encode(before, add_special_tokens=not model.has_chat_template)
        if len(ids) >= point.preceding_tokens:
            return Frame(ids, between, end)
        count += 1 + (point.preceding_tokens - len(ids)) // 25


def other_lines() -> Sequence[str]:
    """Rules that no request is about."""
    demo = [line[2:] for line in policy().splitlines() if line.startswith("- ") and not line.startswith("- For a ")]
    lines = sorted({*FILLERS["train"], *FILLERS["held_out"], *demo})
    random.Random(_SEED).shuffle(lines)
    return lines


def _render(model: Model, area: Area, other: str) -> str:
    if area == "system":
        messages = [("system", f"{TITLE}{other}\n\n{_PIECES}"), ("user", _REQUEST)]
    else:
        messages = [
            ("system", f"{TITLE}{other}"),
            ("user", "A case is coming in. Please look up what applies to it."),
            ("assistant", "Send me what was found."),
            ("user", f"This was found:\n{_PIECES}\n{_REQUEST}"),
        ]
    if not model.has_chat_template:
        spoken = "\n\n".join(
            content if role == "system" else f"{role.title()}: {content}" for role, content in messages
        )
        return spoken + "\nAction:"
    conversation = [{"role": role, "content": content} for role, content in messages]
    return str(model.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def _cut(rendered: str) -> tuple[str, str, str]:
    before, mark, rest = rendered.partition(_PIECES)
    between, asked, end = rest.partition(_REQUEST)
    if not mark or not asked or _PIECES in rest or _REQUEST in end:
        raise TemplateError(
            "the chat template drops or repeats a system or user message, so the position of the pieces is ambiguous"
        )
    return before, between, end
