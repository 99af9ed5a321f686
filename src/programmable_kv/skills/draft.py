"""Drafts: a skill's text, checked and tokenised behind its preface, before anything is computed; and its rows.

Without a preface a skill still reads the token that begins every text, if the tokenizer has one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.arguments import choice_of, require
from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.rows import Rows
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Declared, Words
from programmable_kv.design.parts import parts_of, reads_behind
from programmable_kv.design.units import skill_units
from programmable_kv.design.visibility import Visibility
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidArgumentError, InvalidValueError, UnknownFieldError
from programmable_kv.models.load import Model
from programmable_kv.prompt.chat import message_alone, opened
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.fields import FieldType, Value, declare
from programmable_kv.prompt.parts import Message, Rendered, Text, unmark
from programmable_kv.prompt.prompt import check_values
from programmable_kv.prompt.readers import check_words, declared_words
from programmable_kv.prompt.tokens import as_text
from programmable_kv.prompt.units import Kind, Unit, joined_unit, tokenised
from programmable_kv.prompt.values import check_name, check_role
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE
from programmable_kv.prompt.written import places_in_json

Preface = str | Sequence[tuple[str, str]]
"""Raw text, or a conversation of (role, content) whose last message is left open, so that the skill is inside it."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A skill's text, tokenised and checked, before anything is computed."""

    name: str
    unit: Unit
    values: Mapping[str, str]
    preface: str
    preface_ids: tuple[int, ...]
    types: Mapping[str, FieldType] = field(default_factory=dict)
    pieces: tuple[Unit, ...] = ()
    """for a skill compiled by design: its units, with each value as a separate unit"""
    mentions: Words = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        text: str,
        fields: Mapping[str, Value],
        name: str | None,
        role: str | None,
        preface: Preface,
        visibility: str | Visibility = Visibility.CAUSAL,
        mentions: Words | None = None,
    ) -> Draft:
        """Make a draft. Arguments and errors are those of `Skill.compile`."""
        require(text, str, "a skill's text is a string")
        design = choice_of(Visibility, visibility, "visibility is") is Visibility.DESIGN
        _check_no_option(text, fields, {
            "name": name, "role": role, "preface": preface or None, "visibility": visibility if design else None,
            "mentions": mentions,
        })  # fmt: skip
        if role is not None:
            check_role(role)
        values, types = _checked_fields(model, text, fields)
        words = _checked_mentions(mentions, values, design=design)
        read = _read(model.tokenizer, preface, inside=role is None)
        return cls._behind(model, text, values, types, name, role, read, words if design else None)

    @classmethod
    def together(
        cls, model: Model, texts: Mapping[str, str], fields: Mapping[str, Value], preface: Preface, between: str
    ) -> list[Draft]:
        """Make drafts, each behind the earlier ones. Arguments and errors are those of `Skill.compile_together`."""
        if (
            not texts
            or not isinstance(texts, Mapping)
            or not all(isinstance(it, str) for it in (*texts.values(), between))
        ):
            raise InvalidValueError(
                "no text to compile: give at least one text in a mapping, name -> text; `between` must be a text too"
            )
        gap = _unit(model.tokenizer, as_text(between, model.tokenizer, "the text between skills"))
        values, types = _checked_fields(model, "\n".join(texts.values()), fields)
        for field_name in fields:
            if field_name in texts:
                raise InvalidValueError(f"{field_name} is the name of both a text and a field: rename one of them")
            if not any("{" + field_name + "}" in text for text in texts.values()):
                raise UnknownFieldError(
                    f"no text has a placeholder {{{field_name}}}. Put it where the value belongs, or omit the value."
                )
        read = _read(model.tokenizer, preface, inside=True)
        drafts: list[Draft] = []
        for name, text in texts.items():
            _check_no_option(text, fields, {"preface": preface or None, "between": between or None})
            own = {of: value for of, value in values.items() if "{" + of + "}" in text}
            draft = cls._behind(model, text, own, types, name, None, read)
            drafts.append(draft)
            read = (draft.preface + draft.unit.text + gap.text, (*draft.preface_ids, *draft.unit.ids, *gap.ids))
        return drafts

    @classmethod
    def _behind(
        cls,
        model: Model,
        text: str,
        fields: Mapping[str, str],
        types: Mapping[str, FieldType],
        name: str | None,
        role: str | None,
        read: tuple[str, tuple[int, ...]],
        designed_with: Words | None = None,
    ) -> Draft:
        """Make a draft behind a preface. `fields` are the values as in the text, already checked.

        `read` is the preface as the model reads it, and its tokens. `designed_with` are the declared words of a skill
        that is compiled by design; None otherwise.
        """
        if not text:
            raise InvalidValueError("the skill's text is empty")
        part = Text(as_text(text, model.tokenizer, "the skill's text"), tuple(fields))
        part.check()
        rendered = (
            unmark(part.marked(fields)) if role is None else message_alone(model.tokenizer, Message(role, part), fields)
        )
        own_types = {of: types[of] for of in fields}
        designed = designed_with is not None and len(fields) > 0
        pieces = skill_units(rendered, own_types, model.tokenizer) if designed else ()
        unit = joined_unit(pieces) if designed else tokenised(model.tokenizer, rendered, Kind.SKILL)
        if not len(unit):
            raise InvalidValueError("the skill has no tokens: its text consists only of values, and they are empty")
        if name is None:
            name = "skill_" + hashlib.sha256(f"{read[0]}{unit.text}".encode()).hexdigest()[:12]
        check_name(name)
        return cls(name, unit, dict(fields), *read, own_types, pieces, designed_with or {})

    @property
    def end(self) -> int:
        """The number of tokens in the preface and the skill together."""
        return len(self.preface_ids) + len(self.unit)

    def rows(self) -> tuple[Rows, PartReads | None]:
        """The rows of the preface and the skill, and which parts they may read (None: everything before them)."""
        return _rows(self.pieces or (self.unit,), self.preface_ids, Declared(self.mentions))


def compile_units(engine: Engine, units: Sequence[Unit], declared: Declared) -> Segment:
    """Compile a skill of a context again, alone: behind the same preface as before, with its current values.

    Args:
        units: the skill's units; the first one says which tokens the skill reads before its own.
        declared: who reads which field of the skill.

    Raises:
        ContextOverflowError: the skill and its preface are longer than the model's positions.
        NonFiniteLogitsError: as in `Engine.compute`.
    """
    read = units[0].read
    rows, reads = _rows(units, read, declared)
    buffer = engine.new_buffer(len(rows))
    engine.compute(buffer, rows, logits=0, reads=reads)
    return buffer.segment(Span(len(read), len(rows)), [token for unit in units for token in unit.ids])


def _rows(units: Sequence[Unit], read: Sequence[int], declared: Declared) -> tuple[Rows, PartReads | None]:
    """The rows of a skill behind what it reads, and which parts they may read (None: everything before them)."""
    ids = (*read, *(token for unit in units for token in unit.ids))
    if len(units) == 1:
        return Rows.appended(ids, 0, 0), None
    context = Context(tuple(units))
    behind = len(read)
    positions = (*range(behind), *(behind + at for at in context.positions_in(Span(0, len(context)))))
    reads = reads_behind(behind, parts_of(context, declared), len(context))
    return Rows(ids, tuple(range(len(ids))), positions), reads


def _checked_fields(
    model: Model, text: str, fields: Mapping[str, Value]
) -> tuple[dict[str, str], dict[str, FieldType]]:
    """The values as text, and their types.

    Raises:
        InvalidValueError: a name or a value is not plain data.
    """
    for name in fields:
        check_name(name)
    values, types = declare(fields, places_in_json(text, fields))
    check_values(model.tokenizer, DEFAULT_TEMPLATE, values, types)
    return values, types


def _checked_mentions(mentions: Words | None, values: Collection[str], *, design: bool) -> dict[str, tuple[str, ...]]:
    """
    Raises:
        InvalidArgumentError: words are declared without `visibility="design"`, or a word has no letter or digit.
        UnknownFieldError: words are declared for a name that is not a field of the skill.
    """
    given = {} if mentions is None else mentions
    if not isinstance(given, Mapping) or not all(isinstance(said, list | tuple) for said in given.values()):
        raise InvalidArgumentError(f"mentions must be a mapping, field -> list of words; got {given!r}")
    words = {name: tuple(dict.fromkeys(said)) for name, said in given.items()}
    if words and not design:
        raise InvalidArgumentError(
            "mentions say which lines of a skill read a field, but without visibility='design' all later lines do: "
            "omit them here, and declare them with Notebook.mentions"
        )
    for said in words.values():
        check_words(said)
    known = {*values, *(word for name in values for word in declared_words(words, name))}
    if unknown := [name for name in words if name not in known]:
        raise UnknownFieldError(
            f"mentions are declared for {unknown[0]!r}, which is not a field of this skill; its fields are: "
            f"{', '.join(values) or 'none'}"
        )
    return words


def _check_no_option(text: str, fields: Mapping[str, object], options: Mapping[str, object]) -> None:
    """
    Raises:
        InvalidValueError: an option was given, and the text has a field of that name whose value it could have been.
    """
    for option, given in options.items():
        if given is not None and option not in fields and "{" + option + "}" in text:
            raise InvalidValueError(
                f"the text has a placeholder {{{option}}}, but {option}=... is the skill's own {option}, not a value "
                f"for it. Give the value in a mapping of values: {{{option!r}: ...}}."
            )


def _read(tokenizer: Any, preface: Preface, *, inside: bool) -> tuple[str, tuple[int, ...]]:
    """A preface as the model reads it, and its tokens. `inside`: the skill is inside the preface's last message."""
    if not preface:
        return "", _beginning(tokenizer)
    if isinstance(preface, str):
        unit = _unit(tokenizer, as_text(preface, tokenizer, "the skill's preface"), special=True)
        return unit.text, unit.ids
    messages: list[tuple[str, str]] = []
    for message in preface:
        if not isinstance(message, tuple | list) or len(message) != 2 or not all(isinstance(it, str) for it in message):
            raise InvalidValueError(
                "a preface must be a text, or a list of messages like ('system', 'Be polite.'); it contains "
                f"{str(message)[:80]!r}"
            )
        role, content = message
        check_role(role)
        messages.append((role, as_text(content, tokenizer, "the skill's preface")))
    unit = _unit(tokenizer, opened(tokenizer, messages, inside=inside))
    return unit.text, unit.ids


def _unit(tokenizer: Any, text: str, *, special: bool = False) -> Unit:
    return tokenised(tokenizer, Rendered(text), Kind.SKILL, special=special)


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """The token that the tokenizer puts at the beginning of every text; empty if there is none.

    Without it the skill's first word becomes an attention sink, which it is in no context. Models that were always
    trained with such a token (Gemma) read a skill spliced that way much worse.
    """
    ids = tuple(tokenizer.encode(""))
    return ids if ids == (tokenizer.bos_token_id,) else ()
