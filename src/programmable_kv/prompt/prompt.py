"""The prompt that an author writes piece by piece: chat messages or raw text, with fields and skills in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from programmable_kv.arguments import require
from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidEditError
from programmable_kv.prompt.characters import without_byte_order_mark
from programmable_kv.prompt.chat import render_chat
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.fields import TEXT, FieldType, Value, declare
from programmable_kv.prompt.guard import check_text
from programmable_kv.prompt.parts import Message, Rendered, Text, unmark, unshielded
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.prompt.tokens import as_text
from programmable_kv.prompt.values import check_name, check_role
from programmable_kv.prompt.written import places_in_json

SKILL_MARK = "\ue003"
"""Stands for a skill in a text until the skill's tokens are spliced in."""


class Prompt:
    """What the author has written so far. Chat messages and raw text do not mix."""

    def __init__(self, tokenizer: Any, erratum_template: str, template: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate(tokenizer)
        self.erratum_template = erratum_template
        self.messages: tuple[Message, ...] = ()
        self.texts: tuple[Text, ...] = ()
        self.values: dict[str, str] = {}
        """The text that fills each placeholder; for a skill, `SKILL_MARK`."""
        self.types: dict[str, FieldType] = {}
        """The type of every field, including the fields in skills."""
        self.skills: dict[str, Mapping[str, str]] = {}
        """For each skill, the values of the fields in it."""

    @property
    def empty(self) -> bool:
        return not self.messages and not self.texts

    @property
    def fields(self) -> dict[str, str]:
        """The text of every field's value, including the fields in skills."""
        own = {name: value for name, value in self.values.items() if name not in self.skills}
        return own | {name: value for values in self.skills.values() for name, value in values.items()}

    def add_message(
        self,
        role: str,
        content: str,
        fields: Mapping[str, Value],
        skills: Mapping[str, Mapping[str, str]],
        types: Mapping[str, FieldType] | None = None,
    ) -> None:
        """Add a chat message.

        Args:
            fields: the fields in the message and their values.
            skills: for each skill in the message, the values of the fields in that skill.
            types: the types of the fields in the skills.

        Raises:
            InvalidArgumentError: the content is not a string.
            UnknownFieldError: a field or skill given here has no placeholder in the content.
            InvalidValueError: a name or value is not plain data, or the content has a special token that cannot be
                text.
            InvalidEditError: the prompt is raw text, a field was declared before with another value, or a skill is
                declared twice.
        """
        require(content, str, "a message's content must be text")
        if self.texts:
            raise InvalidEditError("this notebook is made of raw text; chat messages cannot be mixed in. Use .text().")
        check_role(role)
        content = as_text(content, self.tokenizer, f"the {role} message")
        self.messages = (*self.messages, Message(role, self._declare(content, fields, skills, types or {})))

    def add_text(
        self,
        content: str,
        fields: Mapping[str, Value],
        skills: Mapping[str, Mapping[str, str]],
        types: Mapping[str, FieldType] | None = None,
    ) -> None:
        """Add raw text. Special tokens in it stay special tokens. Arguments and errors: see `add_message`."""
        require(content, str, "raw text must be a string")
        if self.messages:
            raise InvalidEditError(
                "this notebook is made of chat messages; raw text cannot be mixed in. Use .message()."
            )
        self.texts = (*self.texts, self._declare(without_byte_order_mark(content), fields, skills, types or {}))

    def add_to_template(self, fields: Mapping[str, Value]) -> frozenset[str]:
        """Declare fields whose `{name}` stands in tools or template variables. Returns the names that do stand there.

        Most templates write tools as JSON, so the value of a field in a tool must need no escape.

        Raises:
            InvalidValueError: a name or value is not plain data.
            InvalidEditError: a field was declared before with another value.
        """
        template = replace(self.template, fields=tuple(fields), enders={})
        in_tools = replace(template, options={}).placeholders
        for name in sorted(template.placeholders):
            places = {name: None if name in in_tools else False}
            self._declare("{" + name + "}", {name: fields[name]}, {}, {}, places)
        self.template = template
        return frozenset(template.placeholders)

    def _declare(
        self,
        content: str,
        given: Mapping[str, Value],
        skills: Mapping[str, Mapping[str, str]],
        in_skills: Mapping[str, FieldType],
        places: Mapping[str, bool | None] | None = None,
    ) -> Text:
        """`places`: whether each field stands inside JSON strings. If None, this is read off the content."""
        for name in skills:
            check_name(name)
            if name in self.values or content.count("{" + name + "}") > 1:
                raise InvalidEditError(f"{name} is already declared: a skill has one place and a unique name")
        for name in given:
            check_name(name)
        if places is None:
            places = places_in_json(content, {**self.types, **given})
        fields, types = declare(given, places, self.types)
        for name in places.keys() & self.values.keys() - fields.keys():
            types[name] = self.types[name].standing(name, self.values[name], places[name])
        standing = self.fields
        for stated in (fields, *skills.values()):  # a skill's own text fixes a value just as a value given here does
            for name, value in stated.items():
                check_name(name)
                if standing.setdefault(name, value) != value:
                    raise InvalidEditError(
                        f"field {name} is already declared as {standing[name]!r}, now as {value!r}: a field has one value. "
                        "Compile the skill with that value, or rename one of the two fields."
                    )
        inside = {name: value for values in skills.values() for name, value in values.items()}
        known_types = {**self.types, **types}
        for name, kind in in_skills.items():
            known_types[name] = known_types[name].joined(name, standing[name], kind) if name in known_types else kind
        check_values(self.tokenizer, self.erratum_template, {**self.fields, **inside, **fields}, known_types)
        known = {**self.values, **fields, **dict.fromkeys(skills, SKILL_MARK)}
        declared = fields.keys() | skills.keys()
        text = Text(content, tuple(name for name in known if name in declared or "{" + name + "}" in content))
        text.check()
        self.values = known
        self.types = known_types
        self.skills.update(skills)
        return text

    @property
    def remarks(self) -> str:
        """What of the text its author may not expect; empty if nothing."""
        texts = [*(message.content for message in self.messages), *self.texts]
        names = dict.fromkeys(name for text in texts for name in text.unfilled)
        listed = ", ".join("{" + name + "}" for name in names)
        return f"no value was given for {listed}, so the model reads the braces as text" if names else ""

    def rendered(self) -> Rendered:
        """The whole prompt as the model will read it, with the character span of every field.

        Raises:
            TemplateError: the chat template refuses the messages, or changes what they say.
        """
        if self.messages:
            return unshielded(render_chat(self.template, self.messages, self.values))
        return unmark("".join(text.marked(self.values) for text in self.texts))

    def pieces(self) -> list[Rendered | str]:
        """The prompt cut at its skills: rendered pieces of text and names of skills, in order.

        Raw text always begins with a piece of text, even if a skill comes first: if the tokenizer has a token that
        begins every text, the token goes into that piece.

        Raises:
            TemplateError: the chat template refuses the messages, or changes what they say.
            InvalidEditError: an empty field has no text before or after it.
        """
        rendered = self.rendered()
        pieces: list[Rendered | str] = []
        start = 0
        fields = [(name, span) for name, span in rendered.places if name not in self.skills]
        end = Span(len(rendered.text), len(rendered.text))
        for name, span in [*((name, span) for name, span in rendered.places if name in self.skills), ("", end)]:
            inside = tuple((field, s.shifted(-start)) for field, s in fields if s.stop <= span.start)
            fields = fields[len(inside) :]
            if span.start > start or (not pieces and not self.messages):
                plain = tuple(s.shifted(-start) for s in rendered.plain if start <= s.start < span.start)
                pieces.append(Rendered(rendered.text[start : span.start], inside, plain))
            elif inside:
                raise InvalidEditError(
                    f"field {inside[0][0]} is empty and has no text on either side, so it has no position. Write some text "
                    "before or after its placeholder."
                )
            if name:
                pieces.append(name)
            start = span.stop
        return pieces

    def conversation(self) -> Conversation | None:
        """The messages as a conversation that can be continued; None for raw text."""
        return Conversation(self.template, self.messages, dict(self.values)) if self.messages else None


def check_values(
    tokenizer: Any, erratum_template: str, values: Mapping[str, str], types: Mapping[str, FieldType]
) -> None:
    """Check that every value is plain data: it must not speak as a role, or of another of these fields.

    Args:
        values: every field's value, as it stands in the text.

    Raises:
        InvalidValueError: a value could be read as something other than data.
    """
    for name, value in values.items():
        check_text(name, value, types.get(name, TEXT), tokenizer, erratum_template, values)
