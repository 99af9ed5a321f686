"""A skill: a text compiled once, alone, whose cache is spliced wherever it is needed.

A policy, a tool's description, a document, a tool's result. Compiled alone it has seen nothing but itself, so its
keys and values are right at any position, in any context, except for what its tokens would have read from the text before
them. Seam repair reduces that difference, and so does a *preface*: text like the one that will precede the skill, which it
reads while it is compiled, and which is not part of it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from programmable_kv.account import Account
from programmable_kv.arguments import choice_of
from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.rows import Rows
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Declared, Words
from programmable_kv.design.parts import parts_of, reads_behind
from programmable_kv.design.units import skill_units
from programmable_kv.design.visibility import Visibility
from programmable_kv.errors import FingerprintMismatchError, InvalidArgumentError, InvalidValueError, UnknownFieldError
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
"""raw text, or a conversation of (role, content) whose last message is left open: the skill is inside of it"""


@dataclass(frozen=True, slots=True)
class Skill:
    """A compiled text: its tokens (`unit`), the values of the fields in it, and its keys and values (`segment`)."""

    name: str
    unit: Unit
    values: Mapping[str, str]
    segment: Segment = field(repr=False)
    fingerprint: str
    """of the model that compiled it"""
    account: Account
    """what compiling it cost"""
    preface: str = ""
    """what it read while it was compiled, and does not hold"""
    preface_ids: tuple[int, ...] = ()
    """its tokens; without a preface the one that begins every text, where the tokenizer has one"""
    rounded: bool = False
    """kept in fewer bits than it was computed in: close, and never exact"""
    types: Mapping[str, FieldType] = field(default_factory=dict)
    """of the fields in it"""
    pieces: tuple[Unit, ...] = ()
    """of one that was compiled by design: its units, the values apart"""
    mentions: Words = field(default_factory=dict)
    """of one that was compiled by design: what else its lines say when they speak of a field"""

    @property
    def text(self) -> str:
        return self.unit.text

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def packed(self) -> bytes:
        """Its token ids, four bytes each, as a ledger keeps them."""
        return array("I", self.unit.ids).tobytes()

    @property
    def packed_preface(self) -> bytes:
        """The token ids of its preface, four bytes each."""
        return array("I", self.preface_ids).tobytes()

    @property
    def placed(self) -> tuple[Unit, ...]:
        """Its text as units of a context, under its name."""
        words = tuple((name, tuple(said)) for name, said in sorted(self.mentions.items()))
        return tuple(
            replace(unit, name=self.name, read=self.preface_ids, words=words) for unit in self.pieces or (self.unit,)
        )

    @property
    def visibility(self) -> Visibility:
        """How its tokens read each other."""
        return Visibility.DESIGN if self.pieces else Visibility.CAUSAL

    @classmethod
    def compile(
        cls,
        model: Model,
        text: str,
        values: Mapping[str, Value] | None = None,
        /,
        *,
        name: str | None = None,
        role: str | None = None,
        preface: Preface = "",
        visibility: str | Visibility = Visibility.CAUSAL,
        mentions: Words | None = None,
        **fields: Value,
    ) -> Skill:
        """Compute a text alone (behind the token that begins every text, where the tokenizer has one), or behind a preface.

        Args:
            text: what it says; `{field}` placeholders as in `Notebook.message`.
            values, fields: the fields' values; those of fields that are called `name`, `role` or `preface` in `values`.
            name: what it is called in a context; a digest of its text and preface when None.
            role: render it as a chat message of this role, to be spliced between turns (a tool's result, say).
            preface: text that it reads while it is computed and that is then discarded: text of the kind that will precede it.
                What it concludes from the preface stays in its keys and values. Right behind exactly these tokens it is exact.
                With a `role`, the preface's last message is closed.
            visibility: `design`, for a notebook under `visibility="design"`: a field in the skill is read by those of its lines
                that mention it, so that an edit computes just these again. Without fields in it a skill needs none.
            mentions: with `design`, field -> what else its lines say when they speak of the field, as `Notebook.mentions`.
                The notebook that it comes into takes these words over.

        Raises:
            InvalidArgumentError: there is no such visibility, or words are declared for one that has no use for them.
            UnverifiedError: `design`, and this model cannot compute with a mask of its own.
            InvalidValueError: the text is empty, it or the preface has a special token that cannot be plain text, or a name or
                value is not plain data.
            UnknownFieldError: a field has no placeholder in the text.
            ContextOverflowError: it is longer than the model's positions, the preface included.
            TemplateError: the chat template does not take a message of that role, or the preface.
        """
        draft = Draft.of(model, text, {**(values or {}), **fields}, name, role, preface, visibility, mentions)
        return compute_drafts(model, [draft])[0]

    @classmethod
    def compile_together(
        cls,
        model: Model,
        texts: Mapping[str, str],
        values: Mapping[str, Value] | None = None,
        /,
        *,
        preface: Preface = "",
        between: str = "",
        **fields: Value,
    ) -> list[Skill]:
        """Compile several texts in one forward, each behind those before it: its preface is all of them.

        Spliced in this order, behind the same preface and with the same text between them, all of them are exact. In another
        order, or some of them only, each is a skill that has read those before it in `texts`, the values in them included.

        Args:
            texts: name -> text, in order; `{field}` placeholders as in `compile`. What changes often is best in the last.
            values, fields: the fields' values, each for every text that has its placeholder.
            preface: what the first one reads, and so all of them; as in `compile`.
            between: text between two of them, which belongs to neither ("\\n\\n" in an `Agent`). A placeholder in
                it, or in the preface, is plain text.

        Raises:
            InvalidValueError, UnknownFieldError, ContextOverflowError, TemplateError: as `compile`; or there is no text.
        """
        return compute_drafts(model, Draft.together(model, texts, {**(values or {}), **fields}, preface, between))

    def check_fits(self, model: Model) -> None:
        """
        Raises:
            FingerprintMismatchError: another model, tokenizer or dtype compiled it.
        """
        check_fingerprint(self.name, self.fingerprint, model)


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
    """by design: its units, the values apart"""
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
        """Arguments and errors as `Skill.compile`."""
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
        """Each behind those before it. Arguments and errors as `Skill.compile_together`."""
        if (
            not texts
            or not isinstance(texts, Mapping)
            or not all(isinstance(it, str) for it in (*texts.values(), between))
        ):
            raise InvalidValueError(
                "there is no text to compile: give at least one in a mapping, name -> text; `between` is a text too"
            )
        gap = _unit(model.tokenizer, as_text(between, model.tokenizer, "the text between skills"))
        values, types = _checked_fields(model, "\n".join(texts.values()), fields)
        for field_name in fields:
            if field_name in texts:
                raise InvalidValueError(
                    f"{field_name} is the name of a text and of a field: call one of them something else"
                )
            if not any("{" + field_name + "}" in text for text in texts.values()):
                raise UnknownFieldError(
                    f"no text has a placeholder {{{field_name}}}. Write it where the value belongs, or do not give the value."
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
        """`fields`, as they stand in the text, were checked. `read`: the preface as the model reads it, and its tokens.

        `designed_with`: the declared words of one that is compiled by design.
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
            raise InvalidValueError("the skill has no tokens: all of its text is values, and they are empty")
        if name is None:
            name = "skill_" + hashlib.sha256(f"{read[0]}{unit.text}".encode()).hexdigest()[:12]
        check_name(name)
        return cls(name, unit, dict(fields), *read, own_types, pieces, designed_with or {})

    @property
    def end(self) -> int:
        """Where it ends, the preface counted."""
        return len(self.preface_ids) + len(self.unit)

    def rows(self) -> tuple[Rows, PartReads | None]:
        """Its tokens behind its preface, and what they may read; all that stands before them when None."""
        ids = (*self.preface_ids, *self.unit.ids)
        if not self.pieces:
            return Rows.appended(ids, 0, 0), None
        context = Context(self.pieces)
        read = len(self.preface_ids)
        positions = (*range(read), *(read + at for at in context.positions_in(Span(0, len(context)))))
        reads = reads_behind(read, parts_of(context, Declared(self.mentions)), len(context))
        return Rows(ids, tuple(range(len(ids))), positions), reads


def compute_drafts(model: Model, drafts: Sequence[Draft]) -> list[Skill]:
    """Compute drafts, each behind the one before it, in one forward from position 0.

    Each one's account holds its own tokens and those between it and the one before: together they are what it all cost.
    """
    last = drafts[-1]
    if last.pieces:
        model.engine.require_rows(instead="Compile it without visibility='design'.")
    with model.engine.meter.measure() as reading:
        buffer = model.engine.new_buffer(last.end)
        rows, reads = last.rows()
        model.engine.compute(buffer, rows, logits=0, reads=reads)
    skills: list[Skill] = []
    paid = 0
    for draft in drafts:
        share = (draft.end - paid) / last.end
        account = replace(reading.account, tokens_computed=draft.end - paid, seconds=share * reading.account.seconds)
        segment = buffer.segment(Span(len(draft.preface_ids), draft.end), draft.unit.ids)
        skills.append(
            Skill(
                draft.name,
                draft.unit,
                draft.values,
                segment,
                model.fingerprint,
                account,
                draft.preface,
                draft.preface_ids,
                types=draft.types,
                pieces=draft.pieces,
                mentions=draft.mentions,
            )
        )
        paid = draft.end
    return skills


def _checked_fields(
    model: Model, text: str, fields: Mapping[str, Value]
) -> tuple[dict[str, str], dict[str, FieldType]]:
    """The texts of values, and their types.

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
        InvalidArgumentError: words are declared that nothing would look for, or a word has no letter or digit.
        UnknownFieldError: words are declared for no field of the skill.
    """
    given = {} if mentions is None else mentions
    if not isinstance(given, Mapping) or not all(isinstance(said, list | tuple) for said in given.values()):
        raise InvalidArgumentError(f"mentions are a mapping, field -> list of words; got {given!r}")
    words = {name: tuple(dict.fromkeys(said)) for name, said in given.items()}
    if words and not design:
        raise InvalidArgumentError(
            "mentions say which lines of a skill read a field, and without visibility='design' all later ones do: leave "
            "them out, and declare them with Notebook.mentions"
        )
    for said in words.values():
        check_words(said)
    known = {*values, *(word for name in values for word in declared_words(words, name))}
    if unknown := [name for name in words if name not in known]:
        raise UnknownFieldError(
            f"mentions are declared for {unknown[0]!r}, which is no field of this skill; its fields are: "
            f"{', '.join(values) or 'none'}"
        )
    return words


def _check_no_option(text: str, fields: Mapping[str, object], options: Mapping[str, object]) -> None:
    """
    Raises:
        InvalidValueError: an option that was given could have been meant as the value of a field of that name.
    """
    for option, given in options.items():
        if given is not None and option not in fields and "{" + option + "}" in text:
            raise InvalidValueError(
                f"the text has a placeholder {{{option}}}, and {option}=... is the skill's own {option}, not a value for it. "
                f"Give the value in a mapping of values: {{{option!r}: ...}}."
            )


def _read(tokenizer: Any, preface: Preface, *, inside: bool) -> tuple[str, tuple[int, ...]]:
    """A preface as the model reads it, and its tokens; `inside`: the skill is inside of its last message."""
    if not preface:
        return "", _beginning(tokenizer)
    if isinstance(preface, str):
        unit = _unit(tokenizer, as_text(preface, tokenizer, "the skill's preface"), special=True)
        return unit.text, unit.ids
    messages: list[tuple[str, str]] = []
    for message in preface:
        if not isinstance(message, tuple | list) or len(message) != 2 or not all(isinstance(it, str) for it in message):
            raise InvalidValueError(
                f"a preface is a text, or a list of messages like ('system', 'Be polite.'); got {str(message)[:80]!r} in it"
            )
        role, content = message
        check_role(role)
        messages.append((role, as_text(content, tokenizer, "the skill's preface")))
    unit = _unit(tokenizer, opened(tokenizer, messages, inside=inside))
    return unit.text, unit.ids


def _unit(tokenizer: Any, text: str, *, special: bool = False) -> Unit:
    return tokenised(tokenizer, Rendered(text), Kind.SKILL, special=special)


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """The token that begins every text, where the tokenizer puts one.

    A text without it makes an attention sink of its first word, which no context does. Models that were always trained with
    such a token (Gemma) read a splice of that much worse.
    """
    ids = tuple(tokenizer.encode(""))
    return ids if ids == (tokenizer.bos_token_id,) else ()


def check_fingerprint(name: str, fingerprint: str, model: Model) -> None:
    """
    Raises:
        FingerprintMismatchError: the skill of that name was compiled by another model, tokenizer or dtype.
    """
    if fingerprint != model.fingerprint:
        raise FingerprintMismatchError(
            f"skill {name!r} was compiled by a model with fingerprint {fingerprint[:8]}, and this one's is "
            f"{model.fingerprint[:8]} ('{model.name}'). Keys and values only fit the weights, tokenizer and dtype that made "
            "them: compile it again."
        )


def skills_among(fields: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, Skill]]:
    """The plain values and the skills among a message's keyword arguments."""
    skills = {name: value for name, value in fields.items() if isinstance(value, Skill)}
    return {name: value for name, value in fields.items() if name not in skills}, skills


def types_in(skills: Iterable[Skill]) -> dict[str, FieldType]:
    """The types of the fields in some skills."""
    return {name: kind for skill in skills for name, kind in skill.types.items()}
