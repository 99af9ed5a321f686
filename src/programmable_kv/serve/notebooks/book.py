"""A notebook in front of an upstream: its text with placeholders, the values it was sent with first, and the latest ones."""

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
"""the beginning of the gateway's own lines; no value may look like one"""


@dataclass(frozen=True, slots=True)
class Book:
    """One notebook of one tenant. It is immutable: an edit makes a new `Book`."""

    identity: str
    tenant: str
    version: int
    """one more with every edit that changes a value"""
    source: Mapping[str, Any] = field(repr=False)
    """the request it was made from"""
    token: str = field(repr=False)
    """the token that its lines carry; its text announces it"""
    texts: Mapping[str, str] = field(repr=False)
    """the latest values, as they stand in the text"""
    base: Mapping[str, str] = field(repr=False)
    """the values that its text is always sent with; lines tell the values that differ from them"""

    @property
    def upstream_model(self) -> str:
        """What the upstream calls the model."""
        return str(self.source["upstream_model"])

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """As Chat Completions takes them, with placeholders."""
        found: Sequence[Mapping[str, Any]] = self.source["messages"]
        return found

    @property
    def skills(self) -> Mapping[str, str]:
        """Texts of compiled skills, by their placeholders."""
        return {name: skill["text"] for name, skill in (self.source.get("skills") or {}).items()}

    @property
    def etag(self) -> str:
        """The `ETag` of its version."""
        return etag_of(self.version)

    @property
    def types(self) -> Mapping[str, FieldType]:
        """What each field may hold."""
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
    """A notebook's first values as they stand in its text, and their types. The guard does not check them here.

    Raises:
        UnknownFieldError: a field has no placeholder in any message.
        InvalidValueError: a name is not plain, or a value does not have its type.
    """
    places = source["places"] if "places" in source else located(source)
    return declare(_fields(source), places)


def located(source: Mapping[str, Any]) -> dict[str, bool | None]:
    """Where each field stands: inside of JSON strings (True), outside of them (False), or both (None). The source keeps it
    as `places`, so that the messages are not searched for each request.

    Raises:
        UnknownFieldError: a field has no placeholder in any message.
        InvalidValueError: a name is not plain, or a skill does not have exactly one placeholder of its own.
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
            raise InvalidValueError(f"the skill {{{name}}} has one placeholder in the messages, and a name of its own")
    missing = [name for name in fields if name not in places]
    if missing:
        raise UnknownFieldError(
            f"no message has the placeholder {{{missing[0]}}}. Write it where the value belongs, or do not declare the field. "
            "(In front of an upstream, fields stand in messages, not in tools or template variables.)"
        )
    return places


def check_size(messages: Sequence[Mapping[str, Any]], texts: Mapping[str, str], most_bytes: int) -> None:
    """Check that a short request cannot make a very long prompt by a placeholder that stands in many places.

    Raises:
        RefusedError: the values in all of their places take more bytes than a request may have.
    """
    nbytes = {name: len(text.encode()) for name, text in texts.items()}
    if sum(nbytes.get(name, 0) for name in _placeholders(messages)) > most_bytes:
        raise too_large(most_bytes)


def changed(book: Book, values: Mapping[str, Any]) -> dict[str, str]:
    """All values after an edit, as they stand in the text.

    Raises:
        UnknownFieldError: the notebook has no such field.
        InvalidValueError: a value is refused.
    """
    types = book.types
    if unknown := values.keys() - types.keys():
        raise UnknownFieldError(
            f"there is no field {min(unknown)!r:.80}; the notebook has {', '.join(sorted(types)) or 'none'}"
        )
    texts, by = edited(values, types)
    guard(texts, by, book.texts)
    return {**book.texts, **texts}


def guard(texts: Mapping[str, str], types: Mapping[str, FieldType], names: Mapping[str, str]) -> None:
    """Check that no value can pass for a role, a marker of a chat format, an update of a field, or a gateway's line.

    Raises:
        InvalidValueError: a value can.
    """
    for name, text in texts.items():
        check_text(name, text, types[name], None, DEFAULT_TEMPLATE, names)
        check_text(name, text, types[name], None, _STATE_LINE)


def filled(messages: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """The messages with the values in their places."""

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
        InvalidValueError: a message cannot.
    """
    for message in messages:
        role, content = message["role"], message.get("content")
        if role not in _ROLES:
            raise InvalidValueError(f"a message's role is one of {', '.join(_ROLES)}, got {role!r:.40}")
        if unknown := message.keys() - _OF_MESSAGE:
            raise InvalidValueError(f"a message of a notebook has no {min(unknown)!r:.60}: leave it out")
        parts = content if isinstance(content, list) else []
        texts = all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts)
        kinds = all(part.get("type", "text") == "text" for part in parts) if texts else False
        said = isinstance(content, str) or (content is None and message.get("tool_calls"))
        if not said and not (isinstance(content, list) and parts and texts and kinds):
            raise InvalidValueError(
                f"the content of the {role} message is text, or a list of parts {{'type': 'text', 'text': ...}}"
            )
        if not all(map(_is_whole, message.get("tool_calls") or ())):
            raise InvalidValueError(
                "a call has an id, and a function with a name and arguments: the text of a JSON object"
            )
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise InvalidValueError("a message of a tool says which call it answers: give tool_call_id")


def _is_whole(call: Mapping[str, Any]) -> bool:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    return isinstance(call.get("id"), str) and isinstance(arguments, Mapping)


def _fields(source: Mapping[str, Any]) -> dict[str, Any]:
    return {name: field_of(name, value) for name, value in (source.get("fields") or {}).items()}


def _placeholders(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The name in each placeholder."""
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
