"""Chat messages through a tokenizer's own template, and how a cached conversation goes on.

A template is a program: it may drop a message, rewrite it, or render earlier ones differently once another follows. What it
makes of a message is therefore compared with the message, and refused where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.errors import InvalidValueError, TemplateError
from programmable_kv.prompt.parts import Message, Rendered, Text, unmark

_EARLIER = "\ue008"
"""what earlier messages say, where only their presence matters"""


def render_chat(
    tokenizer: Any, messages: Sequence[Message], values: Mapping[str, str], *, prompt_for_answer: bool = False
) -> Rendered:
    """Messages as the model reads them, and where the fields' values stand.

    Raises:
        TemplateError: the template refuses these roles, or changes what the messages say.
    """
    marked = _apply(tokenizer, [(m.role, m.content.marked(values)) for m in messages], prompt_for_answer)
    plain = _filled(tokenizer, messages, values, prompt_for_answer)
    rendered = unmark(marked)
    if rendered.text != plain or len(rendered.places) != sum(len(m.content.placeholders) for m in messages):
        raise TemplateError(
            "the chat template changes a message in a way that depends on its content, so field spans cannot be exact. "
            "Put no field at the very start or end of a message, or use raw text parts."
        )
    # A template that upper-cases changes a value with or without marks: what stands there must be the value itself.
    written = [(name, values[name]) for m in messages for name in m.content.placeholders]
    for (name, value), (_, span) in zip(written, rendered.places, strict=True):
        if plain[span.start : span.stop] != value:
            raise TemplateError(
                f"the chat template writes {plain[span.start : span.stop]!r} where the value of {name} is {value!r}, so an "
                "edit could not write what the template would. Use raw text parts."
            )
    return rendered


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that are cached, and the text that the template makes of them.

    `values` fill the placeholders. They need not be those in force: they only have to be the same each time, so that what
    another message adds can be read off.
    """

    tokenizer: Any = field(repr=False)
    messages: tuple[Message, ...]
    values: Mapping[str, str]
    text: str | None = field(default=None, repr=False)
    """rendered; None until it is needed"""

    def continued(self, more: Sequence[Message], *, prompt_for_answer: bool = False) -> tuple[str, Conversation]:
        """What `more` messages (and the opening of an answer) add to the rendered text, and the conversation with them.

        Renders the whole conversation once.

        Raises:
            TemplateError: the template refuses a message, drops or changes what it says, or renders earlier ones differently.
        """
        before = self.text if self.text is not None else _filled(self.tokenizer, self.messages, self.values, False)
        messages = (*self.messages, *more)
        after = _filled(self.tokenizer, messages, self.values, prompt_for_answer)
        if not after.startswith(before):
            raise TemplateError(
                "the chat template renders earlier messages differently once another follows, so a cached conversation cannot "
                "be continued as it stands. Use raw text parts, or a template that only appends."
            )
        added = after[len(before) :]
        cursor = 0
        for message in more:
            content = message.content.filled(self.values).strip()
            found = added.find(content, cursor)
            if found < 0:
                raise TemplateError(
                    f"the chat template drops or rewrites the {message.role} message at this point: {content[:60]!r} is not in "
                    "what it renders. Use another role, or raw text parts."
                )
            cursor = found + len(content)
        text = None if prompt_for_answer else after
        return added, Conversation(self.tokenizer, messages, self.values, text)


def message_alone(tokenizer: Any, message: Message, values: Mapping[str, str]) -> Rendered:
    """What a template adds for one message in mid-conversation: without what it puts at the start of every conversation.

    Raises:
        TemplateError: the template takes no message of that role after any of the beginnings tried, or gives the earlier
            ones another form because of it.
    """
    refused: TemplateError | None = None
    for roles in (("system",), ("system", "user"), ("user", "assistant"), ("system", "user", "assistant"), ("user",)):
        beginning = [Message(role, Text(_EARLIER)) for role in roles]
        try:
            before = render_chat(tokenizer, beginning, values).text
            after = render_chat(tokenizer, [*beginning, message], values)
        except TemplateError as error:
            refused = error
            continue
        if (
            after.text.startswith(before)
            and len(after.text) > len(before)
            and _EARLIER not in after.text[len(before) :]
        ):
            places = tuple((name, span.shifted(-len(before))) for name, span in after.places)
            return Rendered(after.text[len(before) :], places)
    raise refused or TemplateError(
        f"the chat template does not render a {message.role} message apart from those before it, so it cannot be compiled "
        "alone. Compile the text without a role."
    )


def opened(tokenizer: Any, messages: Sequence[tuple[str, str]], *, inside: bool) -> str:
    """A conversation of (role, content); `inside`: only up to where the content of its last message ends.

    Raises:
        InvalidValueError: the last message has a private-use character that marks its end here.
        TemplateError: the template refuses these roles, or does not say what the last message says just once.
    """
    if not inside:
        return _apply(tokenizer, messages, False)
    *earlier, (role, content) = messages
    if _EARLIER in content:
        raise InvalidValueError(f"the text contains the private-use character U+{ord(_EARLIER):04X}; remove it")
    before, mark, after = _apply(tokenizer, [*earlier, (role, content + _EARLIER)], False).partition(_EARLIER)
    if not mark or _EARLIER in after:
        raise TemplateError(
            f"the chat template drops or repeats the {role} message, so no text has its place in it. Write the preface as "
            "raw text."
        )
    return before


def answer_end(tokenizer: Any) -> str:
    """What a template writes after an assistant's answer; empty where it refuses to say."""
    answer = "Yes"
    try:
        rendered = _apply(tokenizer, [("user", "?"), ("assistant", answer)], False)
    except TemplateError:
        return ""
    return rendered.rpartition(answer)[2] if answer in rendered else ""


def _filled(tokenizer: Any, messages: Sequence[Message], values: Mapping[str, str], prompt_for_answer: bool) -> str:
    return _apply(tokenizer, [(m.role, m.content.filled(values)) for m in messages], prompt_for_answer)


def _apply(tokenizer: Any, messages: Sequence[tuple[str, str]], prompt_for_answer: bool) -> str:
    from jinja2 import TemplateError as JinjaError

    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt_for_answer))
    except (JinjaError, ValueError) as error:
        roles = ", ".join(role for role, _ in messages[-4:])
        raise TemplateError(f"the chat template refuses this conversation (... {roles}): {error}") from error
