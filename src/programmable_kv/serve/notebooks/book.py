"""A notebook in front of an upstream: text with placeholders, the values sent in the text, and the latest values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.errors import InvalidValueError, UnknownFieldError
from programmable_kv.prompt.fields import FieldType, declare, edited
from programmable_kv.prompt.guard import check_text
from programmable_kv.prompt.values import check_name
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE
from programmable_kv.prompt.written import PLACEHOLDER, places_in_json
from programmable_kv.serve.notebooks.source import etag_of, field_of, too_large, types_told

HEAD_ROLES = ("system", "developer")
_ROLES = (*HEAD_ROLES, "user", "assistant", "tool")
_OF_MESSAGE = {"role", "content", "tool_calls", "tool_call_id", "name"}
_STATE_LINE = "[state {name}: {value}"
"""The beginning of the gateway's own lines. The guard refuses values that look like one."""


@dataclass(frozen=True, slots=True)
class Book:
    """One notebook of one tenant. It is immutable: an edit makes a new `Book`."""

    identity: str
    tenant: str
    version: int
    """The version, from 1. Every edit that changes `texts` or `base` adds one."""
    source: Mapping[str, Any] = field(repr=False)
    """The request that created the notebook."""
    token: str = field(repr=False)
    """The token that marks the notebook's lines. The notebook's text announces it."""
    texts: Mapping[str, str] = field(repr=False)
    """The latest values, as the text shows them."""
    base: Mapping[str, str] = field(repr=False)
    """The values in the text that is sent. Lines state the latest values that differ from them."""

    @property
    def upstream_model(self) -> str:
        """The model's name at the upstream."""
        return str(self.source["upstream_model"])

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The messages in the form of Chat Completions, with placeholders."""
        found: Sequence[Mapping[str, Any]] = self.source["messages"]
        return found

    @property
    def skills(self) -> Mapping[str, str]:
        """placeholder -> the text of a compiled skill"""
        return {name: skill["text"] for name, skill in (self.source.get("skills") or {}).items()}

    @property
    def etag(self) -> str:
        """The `ETag` of the version."""
        return etag_of(self.version)

    @property
    def types(self) -> Mapping[str, FieldType]:
        """The type of each field."""
        return declared(self.source)[1]

    def as_json(self, **more: Any) -> dict[str, Any]:
        """The notebook as JSON data."""
        types = self.types
        return {
            "id": self.identity,
            "object": "notebook",
            "model": f"notebook:{self.identity}",
            "upstream_model": self.upstream_model,
            "version": self.version,
            "fields": {name: types[name].shown(text) for name, text in self.texts.items()},
            "types": types_told(self.source),
            "skills": {name: skill["skill"] for name, skill in (self.source.get("skills") or {}).items()},
            **more,
        }


def declared(source: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, FieldType]]:
    """Return a notebook's first values as its text shows them, and their types. This does not run the guard.

    Raises:
        UnknownFieldError: a field has no placeholder in any message.
        InvalidValueError: a name is not plain, or a value does not have its type.
    """
    places = source["places"] if "places" in source else located(source)
    return declare(_fields(source), places)


def located(source: Mapping[str, Any]) -> dict[str, bool | None]:
    """Return whether each field stands inside of JSON strings (True), outside of them (False), or both (None).

    The source keeps the result as `places`, so that requests need not search the messages again.

    Raises:
        UnknownFieldError: a field has no placeholder in any message.
        InvalidValueError: a name is not plain, a skill has no placeholder or several, or a field has the skill's name.
    """
    fields, skills = _fields(source), source.get("skills") or {}
    for name in (*fields, *skills):
        check_name(name)
    places: dict[str, bool | None] = {}
    for text in _texts(source["messages"]):
        for name, inside in places_in_json(text, fields).items():
            places[name] = inside if places.get(name, inside) is inside else None
    times = Counter(_placeholders(source["messages"])) if skills else Counter[str]()
    for name in skills:
        if times[name] != 1 or name in fields:
            raise InvalidValueError(
                f"the skill {{{name}}} needs exactly one placeholder in the messages, and a name that no field has"
            )
    missing = [name for name in fields if name not in places]
    if missing:
        raise UnknownFieldError(
            f"no message has the placeholder {{{missing[0]}}}. Write it where the value belongs, or do not declare the field. "
            "(On a gateway, placeholders may be in messages, but not in tools or template variables.)"
        )
    return places


def check_size(messages: Sequence[Mapping[str, Any]], texts: Mapping[str, str], most_bytes: int) -> None:
    """Check the size of all values in all of their places. A short request could repeat a placeholder very often.

    Raises:
        RefusedError: the values take more than `most_bytes` bytes.
    """
    nbytes = {name: len(text.encode()) for name, text in texts.items()}
    if sum(nbytes.get(name, 0) for name in _placeholders(messages)) > most_bytes:
        raise too_large(most_bytes)


def changed(book: Book, values: Mapping[str, Any]) -> dict[str, str]:
    """Return all values after an edit, as the text shows them.

    Raises:
        UnknownFieldError: the notebook has no such field.
        InvalidValueError: a value is refused.
    """
    types = book.types
    if unknown := values.keys() - types.keys():
        raise UnknownFieldError(
            f"unknown field {min(unknown)!r:.80}; the notebook has {', '.join(sorted(types)) or 'none'}"
        )
    texts, by = edited(values, types)
    guard(texts, by, book.texts)
    return {**book.texts, **texts}


def guard(texts: Mapping[str, str], types: Mapping[str, FieldType], names: Mapping[str, str]) -> None:
    """Check that no value looks like a role, a marker of a chat format, an update of a field, or a gateway's line.

    Raises:
        InvalidValueError: a value looks like one of these.
    """
    for name, text in texts.items():
        check_text(name, text, types[name], None, DEFAULT_TEMPLATE, names)
        check_text(name, text, types[name], None, _STATE_LINE)


def filled(messages: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the messages with values in place of the placeholders."""

    def write(text: str) -> str:
        return PLACEHOLDER.sub(lambda match: texts.get(match[1], match[0]), text)

    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = write(content)
        elif isinstance(content, list):
            content = [{**part, "text": write(part["text"])} for part in content]
        found.append({**message, "content": content})
    return found


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that the messages can be written in every protocol.

    Raises:
        InvalidValueError: a message cannot be written in every protocol.
    """
    for message in messages:
        role, content = message["role"], message.get("content")
        if role not in _ROLES:
            raise InvalidValueError(f"a message's role must be one of {', '.join(_ROLES)}, got {role!r:.40}")
        if unknown := message.keys() - _OF_MESSAGE:
            raise InvalidValueError(f"a message of a notebook must not have {min(unknown)!r:.60}: leave it out")
        parts = content if isinstance(content, list) else []
        texts = all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts)
        kinds = all(part.get("type", "text") == "text" for part in parts) if texts else False
        said = isinstance(content, str) or (content is None and message.get("tool_calls"))
        if not said and not (isinstance(content, list) and parts and texts and kinds):
            raise InvalidValueError(
                f"the content of the {role} message must be text or a list of parts {{'type': 'text', 'text': ...}}"
            )
        if not all(map(_is_whole, message.get("tool_calls") or ())):
            raise InvalidValueError(
                "a call must have an id, and a function with a name and with arguments as the text of a JSON object"
            )
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise InvalidValueError("a tool message must name the call that it answers: give tool_call_id")


def _is_whole(call: Mapping[str, Any]) -> bool:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    return isinstance(call.get("id"), str) and isinstance(arguments, Mapping)


def _fields(source: Mapping[str, Any]) -> dict[str, Any]:
    return {name: field_of(name, value) for name, value in (source.get("fields") or {}).items()}


def _placeholders(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the name in each placeholder."""
    for text in _texts(messages):
        for match in PLACEHOLDER.finditer(text):
            yield match[1]


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else ():
            yield part["text"]
