"""A prompt being written: chat messages or raw text, with fields and skills in their places."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidEditError
from programmable_kv.prompt.chat import render_chat
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.parts import Message, Rendered, Text, unmark
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.prompt.values import check_name, check_no_markers, check_role, check_value

SKILL_MARK = "\ue003"
"""stands for a skill in a text until its tokens are spliced in"""


class Prompt:
    """What the author has written so far. Chat messages and raw text do not mix."""

    def __init__(self, tokenizer: Any, erratum_template: str, template: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate(tokenizer)
        self.erratum_template = erratum_template
        self.messages: tuple[Message, ...] = ()
        self.texts: tuple[Text, ...] = ()
        self.values: dict[str, str] = {}
        """of every placeholder; a skill's is its mark"""
        self.skills: dict[str, Mapping[str, str]] = {}
        """skill -> the values of the fields in it"""

    @property
    def empty(self) -> bool:
        return not self.messages and not self.texts

    @property
    def fields(self) -> dict[str, str]:
        """Every field's value, those in skills included."""
        own = {name: value for name, value in self.values.items() if name not in self.skills}
        return own | {name: value for values in self.skills.values() for name, value in values.items()}

    def add_message(
        self, role: str, content: str, fields: Mapping[str, str], skills: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Add a chat message. `skills`: the name of each skill in it, and the values of the fields in that skill.

        Raises:
            UnknownFieldError: a field or skill given here has no placeholder in the content.
            InvalidValueError: a name or value is not plain data, or the content has special tokens.
            InvalidEditError: the prompt is raw text, a field was declared with another value, or a skill twice.
        """
        if self.texts:
            raise InvalidEditError("this notebook is made of raw text; chat messages cannot be mixed in. Use .text().")
        check_role(role)
        check_no_markers(content, self.tokenizer, f"the {role} message")
        self.messages = (*self.messages, Message(role, self._declare(content, fields, skills)))

    def add_text(self, content: str, fields: Mapping[str, str], skills: Mapping[str, Mapping[str, str]]) -> None:
        """Add raw text. Arguments and errors as `add_message`."""
        if self.messages:
            raise InvalidEditError(
                "this notebook is made of chat messages; raw text cannot be mixed in. Use .message()."
            )
        self.texts = (*self.texts, self._declare(content, fields, skills))

    def _declare(self, content: str, fields: Mapping[str, str], skills: Mapping[str, Mapping[str, str]]) -> Text:
        for name in skills:
            check_name(name)
            if name in self.values or content.count("{" + name + "}") > 1:
                raise InvalidEditError(f"{name} was declared before: a skill has one place, and a name of its own")
        standing = self.fields
        for given in (fields, *skills.values()):  # a value in a skill's own text is as fixed as one given here
            for name, value in given.items():
                check_name(name)
                if standing.setdefault(name, value) != value:
                    raise InvalidEditError(
                        f"field {name} was declared before as {standing[name]!r}, now as {value!r}: a field has one value. "
                        "Compile the skill with that value, or call one of the two fields something else."
                    )
        inside = {name: value for values in skills.values() for name, value in values.items()}
        check_values(self.tokenizer, self.erratum_template, {**self.fields, **inside, **fields})
        known = {**self.values, **fields, **dict.fromkeys(skills, SKILL_MARK)}
        declared = fields.keys() | skills.keys()
        text = Text(content, tuple(name for name in known if name in declared or "{" + name + "}" in content))
        text.check()
        self.values = known
        self.skills.update(skills)
        return text

    def rendered(self) -> Rendered:
        """All of it as the model will read it, with the characters of every field.

        Raises:
            TemplateError: the chat template refuses the messages, or changes what they say.
        """
        if self.messages:
            return render_chat(self.template, self.messages, self.values)
        return unmark("".join(text.marked(self.values) for text in self.texts))

    def pieces(self) -> list[Rendered | str]:
        """The rendered text between skills, and the skills' names, in order.

        Raw text begins with a piece of text also if a skill comes first: the token that begins every text, where the tokenizer
        has one, is put there.
        """
        rendered = self.rendered()
        pieces: list[Rendered | str] = []
        start = 0
        fields = [(name, span) for name, span in rendered.places if name not in self.skills]
        end = Span(len(rendered.text), len(rendered.text))
        for name, span in [*((name, span) for name, span in rendered.places if name in self.skills), ("", end)]:
            inside = tuple((field, s.shifted(-start)) for field, s in fields if start <= s.start < span.start)
            if span.start > start or (not pieces and not self.messages):
                pieces.append(Rendered(rendered.text[start : span.start], inside))
            if name:
                pieces.append(name)
            start = span.stop
        return pieces

    def conversation(self) -> Conversation | None:
        """The messages as a conversation that can go on; None for raw text."""
        return Conversation(self.template, self.messages, dict(self.values)) if self.messages else None


def check_values(tokenizer: Any, erratum_template: str, values: Mapping[str, str], among: Collection[str] = ()) -> None:
    """Check that values are data, given these fields, those named in `among`, and the wording of an erratum.

    Raises:
        InvalidValueError: one of them could be read as something else.
    """
    names = {*values, *among}
    for name, value in values.items():
        check_value(name, value, tokenizer, erratum_template, names)
