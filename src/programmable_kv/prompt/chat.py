"""Renders chat messages with a tokenizer's own template: the text to prefill, which later messages can continue.

A template is a program: it may drop a message, rewrite it, or render earlier messages differently once another follows.
This module therefore compares the rendered text with the messages, and refuses a template that changes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from programmable_kv.errors import InvalidValueError, TemplateError
from programmable_kv.prompt.parts import Message, Rendered, Text, unmark
from programmable_kv.prompt.template import HEAD_ROLES, ChatTemplate, neutral

_EARLIER = "\ue008"
"""The content of earlier messages where only their presence matters."""
_THOUGHT = "<think>"
_FOLD_HINT = "Notebook(model, fold_system=True) puts its text at the beginning of the first user turn."


@dataclass(frozen=True, slots=True)
class Frame:
    """The text that a template puts around messages that another message will follow."""

    pieces: tuple[str, ...]
    """The template's own text around each string that the messages say."""
    opens_turn: bool = False
    """Whether the text ends inside the first user turn, where that turn's content begins: the template has no other
    place for a system message."""
    ender: str = ""
    """Text that the template writes only at the end of a conversation (an end-of-text token); it is not cached."""

    @property
    def tail(self) -> str:
        """The cached text after the last string that the messages say."""
        return self.pieces[-1].removesuffix(self.ender)


def frame(template: ChatTemplate, messages: Sequence[Message], values: Mapping[str, str]) -> Frame:
    """The frame of messages that others will follow.

    Raises:
        TemplateError: the template refuses the messages, or drops, repeats or moves what one of them says.
    """
    if all(message.role in HEAD_ROLES for message in messages):
        return _head(template, messages, values)
    try:
        pieces = template.skeleton(messages, values)
    except TemplateError as error:
        raise _explained(template, messages, values, error) from None
    return Frame(pieces, ender=ender(template, messages, values))


def render_chat(
    template: ChatTemplate, messages: Sequence[Message], values: Mapping[str, str], *, prompt_for_answer: bool = False
) -> Rendered:
    """Messages as the model reads them, with the places of the fields' values.

    Without the opening of an answer, this is the text that every continuation begins with: it leaves out what the
    template writes only at the very end of a conversation.

    Raises:
        TemplateError: the template refuses these roles, or changes what the messages say.
    """
    around = (
        Frame(template.skeleton(messages, values, asks=True))
        if prompt_for_answer
        else frame(template, messages, values)
    )
    given = [*messages, Message("user", Text(_EARLIER))] if around.opens_turn else list(messages)
    rendered = _named(unmark(template.marked(given, values, asks=prompt_for_answer)), values)
    plain = template.filled(given, values, asks=prompt_for_answer)
    _check_fields(template, messages, values, rendered, plain)
    _check_tools(template, plain)
    end = plain.rindex(_EARLIER) if around.opens_turn else len(plain)
    if around.ender and plain.endswith(around.ender):
        end -= len(around.ender)
    return Rendered(plain[:end], tuple((name, span) for name, span in rendered.places if span.stop <= end))


def _named(rendered: Rendered, values: Mapping[str, str]) -> Rendered:
    """Restores the field names as the author wrote them: a template that changes case changes the names too."""
    known = {name.casefold(): name for name in values}
    places = tuple(
        (name if name in values else known.get(name.casefold(), name), span) for name, span in rendered.places
    )
    return Rendered(rendered.text, places)


def _check_fields(
    template: ChatTemplate, messages: Sequence[Message], values: Mapping[str, str], rendered: Rendered, plain: str
) -> None:
    """
    Raises:
        TemplateError: a placeholder has no place in the rendered text, or another text than its value stands there.
    """
    injected = template.placeholders
    wanted = [name for message in messages for name in message.content.placeholders]
    found = [name for name, _ in rendered.places]
    for name in sorted(injected):
        if found.count(name) <= wanted.count(name):
            raise TemplateError(
                f"the chat template does not write the option or tool that contains the field {name}, so there is nothing to "
                "edit. Check which variable the template reads (date_string in Llama 3.1's, strftime_now in gpt-oss's), or "
                "put the field into a message."
            )
    own = [name for name in wanted if name not in injected]
    spans = [span for name, span in rendered.places if name not in injected]
    if rendered.text != plain or len(spans) != len(own):
        raise TemplateError(
            "the chat template changes a message in a way that depends on its content, so field spans cannot be exact. "
            "Put no field at the very start or end of a message, or use raw text parts."
        )
    # A template that upper-cases changes a value with or without marks, so the text there must be the value itself.
    elsewhere = [(name, span) for name, span in rendered.places if name in injected]
    for name, span in [*zip(own, spans, strict=True), *elsewhere]:
        written = plain[span.start : span.stop]
        if written != values[name]:
            raise TemplateError(
                f"the chat template writes {written!r} for {name}, whose value is {values[name]!r}, so an edit cannot write "
                "the text that the template would. Use raw text parts."
            )


def _check_tools(template: ChatTemplate, plain: str) -> None:
    for tool in template.tools:
        name = str(tool.get("function", tool).get("name", ""))
        if name not in plain:
            raise TemplateError(
                f"the chat template does not write the tools: {name!r} is not in the rendered text. Describe them in the "
                "system message, and leave `tools` out."
            )


def _head(template: ChatTemplate, messages: Sequence[Message], values: Mapping[str, str]) -> Frame:
    """The frame of system messages before the first turn; open if the template puts them into that turn."""
    refused: TemplateError | None = None
    pieces: tuple[str, ...] | None = None
    try:
        pieces = template.skeleton(messages, values)
    except TemplateError as error:
        refused = error
    try:
        followed = template.skeleton([*messages, neutral("user")], values)
    except TemplateError as error:
        if pieces is not None:
            return Frame(pieces)
        raise _explained(template, messages, values, refused or error) from None
    count = len(followed) - 1
    if pieces is not None and pieces[:-1] == followed[: count - 1]:
        return Frame(pieces, ender=ender(template, messages, values))
    return Frame(followed[:count], opens_turn=True)


def ender(template: ChatTemplate, messages: Sequence[Message], values: Mapping[str, str]) -> str:
    """The end of the text that the template drops when an answer is asked for, or when another message follows.

    The result is kept for each pair of last roles.

    Raises:
        TemplateError: as `frame`.
    """
    last = messages[-1]
    following = "assistant" if last.role == "user" else "tool" if last.extra.get("tool_calls") else "user"
    roles = (*(message.role for message in messages[-2:]), following)
    if roles in template.enders:
        return template.enders[roles]
    pieces = template.skeleton(messages, values)
    kept = pieces[-1]
    for more, asks in (([], True), ([neutral(following)], False)):
        try:
            other = template.skeleton([*messages, *more], values, asks=asks)
        except TemplateError:
            continue
        if other[: len(pieces) - 1] == pieces[:-1]:  # otherwise it renders earlier messages differently
            kept = _common(kept, other[len(pieces) - 1])
    template.enders[roles] = pieces[-1][len(kept) :]
    return template.enders[roles]


def _common(one: str, other: str) -> str:
    """The longest common prefix."""
    pairs = zip(one, other, strict=False)
    return one[: next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def _explained(
    template: ChatTemplate, messages: Sequence[Message], values: Mapping[str, str], error: TemplateError
) -> TemplateError:
    """The error, with a hint to fold the system message if that is what the template has no place for."""
    if not messages or messages[0].role not in HEAD_ROLES or template.fold_system:
        return error
    folding = replace(template, fold_system=True, enders={})
    turns = messages if any(message.role == "user" for message in messages) else [*messages, neutral("user")]
    try:
        if folding.folds:
            folding.skeleton(turns, values)
            return TemplateError(f"the chat template has no place for a system message ({error}). {_FOLD_HINT}")
    except TemplateError:
        pass
    return error


def message_alone(tokenizer: Any, message: Message, values: Mapping[str, str]) -> Rendered:
    """The text that a template adds for one message in mid-conversation, without what begins every conversation.

    Raises:
        TemplateError: the template accepts no message of that role after any of the beginnings tried, or renders the
            earlier messages differently because of it.
    """
    template = ChatTemplate(tokenizer)
    refused: TemplateError | None = None
    for roles in (("system",), ("system", "user"), ("user", "assistant"), ("system", "user", "assistant"), ("user",)):
        beginning = [Message(role, Text(_EARLIER)) for role in roles]
        try:
            if frame(template, beginning, values).opens_turn:
                continue
            before = render_chat(template, beginning, values).text
            after = render_chat(template, [*beginning, message], values)
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
        f"the chat template cannot render a {message.role} message without the messages before it, so the message cannot be "
        "compiled alone. Compile the text without a role."
    )


def opened(tokenizer: Any, messages: Sequence[tuple[str, str]], *, inside: bool) -> str:
    """The rendered text of (role, content) messages; `inside`: only up to the end of the last message's content.

    Raises:
        InvalidValueError: the last message contains the private-use character that marks its end here.
        TemplateError: the template refuses these roles, or drops, repeats or moves what a message says.
    """
    template = ChatTemplate(tokenizer)
    if not inside:
        return render_chat(template, [Message(role, Text(content)) for role, content in messages], {}).text
    *earlier, (role, content) = messages
    if _EARLIER in content:
        raise InvalidValueError(f"the text contains the private-use character U+{ord(_EARLIER):04X}; remove it")
    ended = [Message(role, Text(content)) for role, content in [*earlier, (role, content + _EARLIER)]]
    before, mark, after = template.filled(ended, {}).partition(_EARLIER)
    if not mark or _EARLIER in after:
        raise TemplateError(
            f"the chat template drops or repeats the {role} message, so text cannot be placed in it. Write the preface as raw "
            "text."
        )
    template.skeleton([Message(role, Text(content)) for role, content in messages], {})  # checks the earlier messages
    return before


def thought_closed(asked: str) -> str:
    """A text that asks for an answer; if the template opens a thought at its end, the thought is closed.

    Right after `<think>` a model does not give its answer, so options could not be compared there.
    """
    if not asked.rstrip("\n").endswith(_THOUGHT):
        return asked
    return asked.rstrip("\n") + "\n\n</think>\n\n"


def answer_end(tokenizer: Any) -> str:
    """The text that a template writes after an assistant's answer; empty if the template raises an error."""
    try:
        return ChatTemplate(tokenizer).skeleton([neutral("user"), neutral("assistant")], {})[-1]
    except TemplateError:
        return ""
