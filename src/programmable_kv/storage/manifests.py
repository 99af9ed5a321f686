"""The manifests of saved notebooks and stored skills, and the saved forms of units, fields and contexts.

Only this module depends on the fields of units and contexts. It checks what is read as far as possible without tensors:
the `check` methods raise before any unit is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Sequence
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Declared, ReadBy, Words
from programmable_kv.errors import CorruptFileError, InvalidArgumentError, InvalidValueError
from programmable_kv.models.load import Model
from programmable_kv.prompt.context import Context, FieldValue
from programmable_kv.prompt.fields import FieldKind, FieldType
from programmable_kv.prompt.guard import check_text
from programmable_kv.prompt.parts import Message, Text
from programmable_kv.prompt.readers import check_words
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.prompt.units import Kind, Place, Unit, joined_unit
from programmable_kv.prompt.values import check_name, check_role, check_template
from programmable_kv.storage.builds import SavedBuild
from programmable_kv.storage.ledgers import SavedLedger
from programmable_kv.storage.sealed import Sealed

_SHOWN_CHARACTERS = 200

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
"""A name as `check_name` accepts it."""
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SavedPlace(_Strict):
    name: str
    characters: tuple[int, int]
    tokens: tuple[int, int]


class SavedUnit(_Strict):
    kind: Kind
    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: bool
    places: tuple[SavedPlace, ...]
    corrects: tuple[tuple[str, str], ...]
    name: str
    plain: tuple[tuple[int, int], ...] = ()
    width: Annotated[int, Field(ge=0)] = 0
    read: tuple[int, ...] = ()
    piece: Annotated[int, Field(ge=0)] = 0
    words: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, unit: Unit) -> SavedUnit:
        places = tuple(
            SavedPlace(
                name=p.name, characters=(p.characters.start, p.characters.stop), tokens=(p.tokens.start, p.tokens.stop)
            )
            for p in unit.places
        )
        return cls(
            kind=unit.kind, text=unit.text, ids=unit.ids, offsets=tuple((a, b) for a, b in unit.offsets.tolist()),
            special=unit.special, places=places, corrects=unit.corrects, name=unit.name,
            plain=tuple((span.start, span.stop) for span in unit.plain), width=unit.width, read=unit.read, piece=unit.piece,
            words=unit.words,
        )  # fmt: skip

    def unit(self) -> Unit:
        places = tuple(Place(p.name, Span(*p.characters), Span(*p.tokens)) for p in self.places)
        offsets = np.array(self.offsets, dtype=np.int32).reshape(-1, 2)
        plain = tuple(Span(*span) for span in self.plain)
        return Unit(
            self.kind, self.text, self.ids, offsets, self.special, places, self.corrects, self.name, plain, self.width,
            self.read, self.piece, self.words,
        )  # fmt: skip

    def check(self, fields: Container[str], model: Model, where: str) -> None:
        """
        Raises:
            CorruptFileError: tokens, offsets and places do not fit each other, the fields, or the model's vocabulary.
        """
        count, length = len(self.ids), len(self.text)
        vocabulary = int(model.engine.model.get_input_embeddings().weight.shape[0])
        if not all(0 <= token < vocabulary for token in (*self.ids, *self.read)):
            raise CorruptFileError(f"{where}: a token id is not in the model's vocabulary of {vocabulary}")
        if len(self.offsets) != count or not all(0 <= a <= b <= length for a, b in self.offsets):
            raise CorruptFileError(f"{where}: the tokens' offsets do not fit {count} tokens of {length} characters")
        reached = 0
        for place in self.places:
            start, stop = place.characters
            if place.name not in fields or not reached <= start <= stop <= length:
                raise CorruptFileError(f"{where}: the value of {place.name!r} has no place in the text")
            if place.tokens != _covering(self.offsets, start, stop):
                raise CorruptFileError(f"{where}: the tokens of {place.name!r} do not match its characters")
            reached = stop
        if not all(0 <= start < stop <= length for start, stop in self.plain):
            raise CorruptFileError(f"{where}: a plain-text mark is outside the text")
        check_mentions(dict(self.words), where)
        if self.piece:
            self.check_piece(self.piece, where)

    def check_piece(self, number: int, where: str) -> None:
        """
        Raises:
            CorruptFileError: this is not piece `number` of a skill that was compiled by design.
        """
        one_thing = [place.characters for place in self.places] in ([], [(0, len(self.text))])
        if self.kind is not Kind.SKILL or self.piece != number or self.special or self.corrects or not one_thing:
            raise CorruptFileError(f"{where}: a piece of a skill must be plain text or exactly one value")


class SavedType(_Strict):
    """A field's type. The defaults are those of `FieldType`."""

    kind: FieldKind = FieldKind.TEXT
    among: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    charset: str = ""
    max_length: int | None = None
    trusted: bool = False
    room: int | None = None
    in_json: bool = False
    mixed: bool = False

    @classmethod
    def of(cls, kind: FieldType) -> SavedType:
        return cls(**asdict(kind))

    def type(self, where: str) -> FieldType:
        """
        Raises:
            CorruptFileError: the options do not fit the kind of field.
        """
        try:
            return FieldType(**dict(self))
        except InvalidArgumentError as error:
            raise CorruptFileError(f"{where}: {error}") from error


class SavedField(_Strict):
    current: str
    written: str
    type: SavedType = SavedType()

    @classmethod
    def of(cls, value: FieldValue) -> SavedField:
        return cls(current=value.current, written=value.written, type=SavedType.of(value.type))

    def value(self) -> FieldValue:
        return FieldValue(self.current, self.written, self.type.type("a field"))


class SavedMessage(_Strict):
    role: str
    template: str
    fields: tuple[str, ...]
    extra: dict[str, Any] = {}


class SavedTemplate(_Strict):
    """The arguments of the chat template other than messages. Notebooks of earlier versions have none."""

    tools: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = {}
    fields: tuple[str, ...] = ()
    fold_system: bool = False

    @classmethod
    def of(cls, template: ChatTemplate) -> SavedTemplate:
        return cls(
            tools=tuple(dict(tool) for tool in template.tools), options=dict(template.options), fields=template.fields,
            fold_system=template.fold_system,
        )  # fmt: skip

    def template(self, tokenizer: Any) -> ChatTemplate:
        return ChatTemplate(tokenizer, self.tools, self.options, self.fields, self.fold_system)


class SavedContext(_Strict):
    """A saved context: its units in slot order, and its fields."""

    units: tuple[SavedUnit, ...]
    fields: dict[str, SavedField]

    @classmethod
    def of(cls, context: Context) -> SavedContext:
        return cls(
            units=tuple(SavedUnit.of(unit) for unit in context.units),
            fields={name: SavedField.of(it) for name, it in context.fields.items()},
        )

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(len(unit.ids) for unit in self.units)

    def context(self) -> Context:
        fields = {name: it.value() for name, it in self.fields.items()}
        return Context(tuple(unit.unit() for unit in self.units), fields)

    def check(self, model: Model, where: str) -> None:
        """
        Raises:
            CorruptFileError: fields and units do not fit each other or the model.
        """
        for name, state in self.fields.items():
            for value in (state.current, state.written):
                _check_value(name, value, state.type, model, where)
        missing = set(self.fields)
        for unit in self.units:
            unit.check(self.fields, model, where)
            missing -= {place.name for place in unit.places}
        if missing:
            raise CorruptFileError(f"{where}: the field {min(missing)!r} has no place in the text")


class NotebookManifest(Sealed):
    """Everything in a saved notebook except its tensors."""

    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "save the notebook again"

    format: Literal[2] = 2
    model_name: str
    fingerprint: str
    dtype: str
    erratum_template: str
    tensors: str
    """the name of the tensors' blob"""
    tensors_sha256: Digest
    messages: tuple[SavedMessage, ...]
    template: SavedTemplate = SavedTemplate()
    placeholders: dict[str, str]
    """the text of every placeholder of the messages when they were rendered, including skills"""
    context: SavedContext
    ledger: SavedLedger | None
    """None under `visibility="design"`"""
    build: SavedBuild | None = None
    """replaces the ledger under `visibility="design"`"""
    mentions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """field -> other words by which lines mention it"""
    read_by: dict[str, ReadBy] = Field(default_factory=dict)
    """field or skill -> who may read it under `visibility="design"`"""

    @property
    def declared(self) -> Declared:
        return Declared(dict(self.mentions), dict(self.read_by))

    def check(self, model: Model, where: str) -> None:
        """
        Raises:
            CorruptFileError: the manifest contradicts itself or does not fit the model.
        """
        try:
            check_template(self.erratum_template)
            for message in self.messages:
                check_role(message.role)
        except InvalidValueError as error:
            raise CorruptFileError(f"{where}: {error}") from error
        named = {name for message in self.messages for name in message.fields} | set(self.template.fields)
        if not named <= self.placeholders.keys():
            raise CorruptFileError(f"{where}: a placeholder in a message has no value")
        self.context.check(model, where)
        check_mentions(self.mentions, where)
        if (self.ledger is None) == (self.build is None):
            raise CorruptFileError(f"{where}: it must have either a ledger or a build, not both")
        if self.ledger is not None:
            self.ledger.check(self.context.length, where)
        if self.build is not None:
            self.build.check(self.context.length, where)


class Entry(Sealed):
    """The manifest of a stored skill. The preface is stored with the tensors; the manifest has its digest."""

    FORMAT: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "remove it, or compile the skill again"

    format: Literal[2] = 2
    key: Key
    name: Name
    model_name: str
    fingerprint: str
    precision: Literal["as computed", "int8"]
    nbytes: Count
    tensors: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}\.[0-9a-f]{16}\.safetensors$")]
    """the name of the tensors' blob; a new one for each write"""
    tensors_sha256: Digest
    values: dict[str, str]
    types: dict[str, SavedType] = Field(default_factory=dict)
    """the types of the fields that do not have the default type, one line of text"""
    preface: str
    """the first characters of the preface, for people to read"""
    preface_tokens: Count
    preface_sha256: Digest
    """digest of the preface's token ids"""
    unit: SavedUnit
    pieces: tuple[SavedUnit, ...] = ()
    """for a skill compiled by design: its units, which together are `unit`"""
    mentions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """for a skill compiled by design: field -> other words by which its lines mention it"""

    def check(self, model: Model, where: str) -> None:
        """
        Raises:
            CorruptFileError: the manifest contradicts itself or does not fit the model.
        """
        unit = self.unit
        if unit.kind is not Kind.SKILL or not unit.ids:
            raise CorruptFileError(f"{where}: it does not contain a skill ({len(unit.ids)} tokens of kind {unit.kind})")
        for name, value in self.values.items():
            _check_value(name, value, self.types.get(name, SavedType()), model, where)
        unit.check(self.values, model, where)
        for place in unit.places:
            if unit.text[slice(*place.characters)] != self.values[place.name]:
                raise CorruptFileError(f"{where}: the value of {place.name!r} differs from the text")
        check_mentions(self.mentions, where)
        for number, piece in enumerate(self.pieces, 1):
            piece.check(self.values, model, where)
            piece.check_piece(number, where)
        if self.pieces and joined_unit([piece.unit() for piece in self.pieces]) != unit.unit():
            raise CorruptFileError(f"{where}: the skill's pieces do not add up to its text")


def key_of(
    fingerprint: str,
    preface_ids: tuple[int, ...],
    ids: tuple[int, ...],
    int8: bool,
    pieces: Sequence[Unit] = (),
    mentions: Words | None = None,
) -> str:
    """The key of a skill: a digest of everything that determines its content."""
    return _key(fingerprint, preface_digest(preface_ids), ids, int8, pieces, mentions or {})


def entry_key(entry: Entry) -> str:
    """The key that an entry's content gives."""
    pieces = [piece.unit() for piece in entry.pieces]
    return _key(
        entry.fingerprint, entry.preface_sha256, entry.unit.ids, entry.precision == "int8", pieces, entry.mentions
    )


def _key(
    fingerprint: str,
    preface_sha256: str,
    ids: tuple[int, ...],
    int8: bool,
    pieces: Sequence[Unit],
    mentions: Words,
) -> str:
    content: dict[str, object] = {
        "format": Entry.FORMAT, "fingerprint": fingerprint, "preface": preface_sha256, "ids": ids, "int8": int8,
    }  # fmt: skip
    if pieces:  # these determine which parts read which: the values' places, the lines, and the words
        content["pieces"] = [(unit.text, len(unit), unit.width, [p.name for p in unit.places]) for unit in pieces]
        content["mentions"] = sorted((name, *words) for name, words in mentions.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def preface_digest(ids: tuple[int, ...]) -> str:
    """The digest of a preface's token ids."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def shortened(preface: str) -> str:
    """The beginning of a preface, as a manifest shows it."""
    return preface if len(preface) <= _SHOWN_CHARACTERS else preface[: _SHOWN_CHARACTERS - 1] + "…"


def saved_messages(messages: tuple[Message, ...]) -> tuple[SavedMessage, ...]:
    return tuple(
        SavedMessage(role=m.role, template=m.content.template, fields=m.content.fields, extra=dict(m.extra))
        for m in messages
    )


def messages_of(saved: tuple[SavedMessage, ...]) -> tuple[Message, ...]:
    return tuple(Message(m.role, Text(m.template, m.fields), m.extra) for m in saved)


def check_mentions(mentions: Words, where: str) -> None:
    """
    Raises:
        CorruptFileError: a declared word is not one that a line could contain.
    """
    for name, words in mentions.items():
        try:
            check_words(words)
        except InvalidArgumentError as error:
            raise CorruptFileError(f"{where}: invalid words for {name!r}: {error}") from error


def _check_value(name: str, value: str, kind: SavedType, model: Model, where: str) -> None:
    """Check that a value is plain data. (Its wording was checked against the other fields when it was set.)"""
    try:
        check_name(name)
        check_text(name, value, kind.type(where), model.tokenizer, "{name}{value}")
    except InvalidValueError as error:
        raise CorruptFileError(f"{where}: {error}") from error


def _covering(offsets: tuple[tuple[int, int], ...], start: int, stop: int) -> tuple[int, int] | None:
    """The tokens [first, stop) that cover any of the characters [start, stop); an empty range for no characters."""
    hit = [index for index, (a, b) in enumerate(offsets) if a < stop and b > start]
    if hit or start < stop:
        return (hit[0], hit[-1] + 1) if hit else None
    between = sum(b <= start for _, b in offsets)
    return between, between
