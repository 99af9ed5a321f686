"""How a chat template writes messages, so that training sequences match what the model will read.

The texts that the template puts before and after the text of a message are found by rendering. Sequences for two
templates differ only in these texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from programmable_kv.errors import TemplateError, TrainingError
from programmable_kv.prompt.chat import message_alone, opened
from programmable_kv.prompt.parts import Message, Text

_SAID = ("\ue0f4", "\ue0f5", "\ue0f6", "\ue0f7")
"""placeholders for the texts of messages, which are found again in a rendering"""
_CHATML = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*)<\|im_end\|>\n\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The texts before and after the text of a message."""

    first: str
    """text before that of the system message that begins a conversation"""
    opens: Mapping[str, str]
    """role -> text before that of a later message"""
    closes: Mapping[str, str]
    """role -> text after that of a message"""
    answer_ends: str
    """the part of the text after an answer that the model writes itself"""
    trims: bool = False
    """whether the template strips white space from the ends of a text"""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """
        Raises:
            TrainingError: the tokenizer has no chat template, or one that does not render system messages, user
                messages or answers on their own, or whose generation prompt differs from the beginning of its answers.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise TrainingError(
                "this model has no chat template, but the recipe trains on chats: use a chat model, or set "
                "tokenizer.chat_template and save it with the base"
            )
        try:
            opens = {role: _before(tokenizer, role) for role in ("user", "assistant")}
            first, closes = _rendered(tokenizer, opens)
            try:
                opens["system"] = _before(tokenizer, "system")
            except TemplateError:  # without system messages in mid-conversation, an erratum is a user message
                opens["system"] = opens["user"]
            spaced = message_alone(tokenizer, Message("user", Text(f"{_SAID[0]}\n")), {}).text
            asked = opened(tokenizer, [("system", _SAID[0]), ("user", _SAID[1])], inside=True)
        except TemplateError as error:
            raise TrainingError(f"the recipe cannot write this model's chats: {error}") from error
        _check_question(tokenizer, asked + closes["user"] + opens["assistant"])
        behind = closes["assistant"]
        special = [behind.index(token) + len(token) for token in tokenizer.all_special_tokens if token in behind]
        trims = f"{_SAID[0]}\n{closes['user']}" not in spaced and f"{_SAID[0]}{closes['user']}" in spaced
        return cls(first, opens, closes, behind[: min(special, default=len(behind))], trims)

    def message(self, role: str, text: str) -> str:
        """Return a later message."""
        return self.opens[role] + (text.strip() if self.trims else text) + self.closes[role]

    def system(self, text: str) -> str:
        """Return the system message that begins a conversation."""
        return self.first + (text.strip() if self.trims else text) + self.closes["system"]

    def last(self, text: str) -> str:
        """Return the last text of a message as the template writes it."""
        return text.rstrip() if self.trims else text

    @property
    def between(self) -> str:
        """The text between an answer's end and the next message."""
        return self.closes["assistant"].removeprefix(self.answer_ends)

    def of_chatml(self, text: str, *, begins: bool) -> str:
        """Convert a ChatML message, or the part of one around an answer, to this format. Other text is unchanged.

        `begins`: whether the message is the first of the conversation.
        """
        if whole := _CHATML.match(text):
            role, said = whole.groups()
            return self.system(said) if begins and role == "system" else self.message(role, said)
        if text == CHATML.opens["assistant"]:
            return self.opens["assistant"]
        said = text.removesuffix(CHATML.answer_ends)
        return said if said == text else said + self.answer_ends


CHATML = ChatFormat(
    "<|im_start|>system\n",
    {role: f"<|im_start|>{role}\n" for role in ("user", "assistant", "system")},
    dict.fromkeys(("user", "assistant", "system"), "<|im_end|>\n"),
    "<|im_end|>",
)
"""the format of the embedded model"""


def _check_question(tokenizer: Any, written: str) -> None:
    """
    Raises:
        TrainingError: `written` differs from what the template renders with a generation prompt.
    """
    messages = [{"role": "system", "content": _SAID[0]}, {"role": "user", "content": _SAID[1]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if rendered != written:
        raise TrainingError(
            f"the recipe cannot write this model's chats: its template asks for an answer with {rendered[-60:]!r}, but writes "
            f"earlier answers after {written[-60:]!r}"
        )


def _before(tokenizer: Any, role: str) -> str:
    """Return the text that a template puts before that of a message in mid-conversation."""
    before, mark, _ = message_alone(tokenizer, Message(role, Text(_SAID[0])), {}).text.partition(_SAID[0])
    if not mark:
        raise TemplateError(f"the chat template drops the text of a {role} message")
    return before


def _rendered(tokenizer: Any, opens: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the text before a conversation's first message text, and role -> the text that closes such a message."""
    roles = ("system", "user", "assistant", "user")
    rest = opened(tokenizer, [*zip(roles, _SAID, strict=True)], inside=True)
    first, _, rest = rest.partition(_SAID[0])
    closes: dict[str, str] = {}
    for role, following, said in zip(roles, roles[1:], _SAID[1:], strict=False):
        between, _, rest = rest.partition(said)
        if not between.endswith(opens[following]):
            raise TemplateError(f"the chat template begins a {following} message differently after a {role} message")
        closes[role] = between.removesuffix(opens[following])
    return first, closes
