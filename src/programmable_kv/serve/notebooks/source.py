"""Checks the request that creates a notebook, and makes the refusals of notebooks. Every server uses them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from types import NoneType
from typing import Any

from programmable_kv.prompt.fields import Field, FieldType, type_of
from programmable_kv.serve.checks import checked_messages
from programmable_kv.serve.refusal import Refusal, RefusedError

PREFIX = "notebook:"
"""The beginning of a notebook's name as a model."""
_OF_FIELD: Mapping[str, type] = {
    "value": object, "kind": str, "among": list, "at_least": float, "at_most": float, "charset": str, "max_length": int,
}  # fmt: skip
"""The members of a field's description. A client cannot turn the guard off, so `trusted` is not among them."""
_LIMITS = ("among", "at_least", "at_most", "charset", "max_length")
_NO_LIMITS = FieldType()
_OF_BODY = ("messages", "fields", "tools", "template_kwargs")


def source_of(body: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Return the source of a notebook from a request's body.

    Args:
        more: further members that the body may have. The caller checks them.

    Raises:
        RefusedError: the body does not describe a notebook.
        InvalidArgumentError: the description of a field does not fit the field's kind.
    """
    if unknown := body.keys() - {*_OF_BODY, *more}:
        raise invalid(f"a notebook may have only {', '.join((*_OF_BODY, *more))}; got {min(unknown)!r:.60}")
    fields = {} if body.get("fields") is None else body["fields"]
    if not isinstance(fields, Mapping):
        raise invalid("fields must be an object")
    tools, variables = body.get("tools"), body.get("template_kwargs")
    if not isinstance(tools, list | NoneType) or not isinstance(variables, Mapping | NoneType):
        raise invalid("tools must be a list, and template_kwargs an object")
    messages = checked_messages(body.get("messages"))
    for name, value in fields.items():
        field_of(name, value)
    return {"messages": messages, "fields": fields, "tools": tools, "template_kwargs": variables}


def field_of(name: str, value: Any) -> Any:
    """Return a plain value unchanged, and an object that describes a field as a `Field`.

    Raises:
        RefusedError: the object has another form.
        InvalidArgumentError: the description does not fit the field's kind.
    """
    if not isinstance(value, Mapping):
        return value
    if "value" not in value or not all(_fits(key, each) for key, each in value.items()):
        raise invalid(
            f"the field {name!r:.60} must be a value, or an object with {', '.join(_OF_FIELD)}, each of the right type"
        )
    return Field(**value)


def types_told(source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the declared kind and limits of each field of a notebook.

    Args:
        source: the request that created the notebook.
    """
    declared = {name: type_of(field_of(name, value)) for name, value in (source.get("fields") or {}).items()}
    return {name: _type_told(found) for name, found in declared.items()}


def check_version(version: int, if_match: str | None) -> None:
    """
    Raises:
        RefusedError: `if_match` does not name this version.
    """
    if if_match is None or any_version(if_match):
        return
    if etag_of(version) not in [each.strip() for each in if_match.split(",")]:
        raise RefusedError(
            Refusal(412, "version_changed", f"the notebook is now at version {version}: read it again, then decide")
        )


def any_version(if_match: str | None) -> bool:
    """Whether the request accepts any version."""
    return if_match is None or if_match.strip() == "*"


def etag_of(version: int) -> str:
    """The `ETag` of a version."""
    return f'"{version}"'


def new_identity() -> str:
    """Return a random id for a new notebook."""
    return f"nb_{secrets.token_hex(12)}"


def no_such_notebook() -> RefusedError:
    """The refusal if the tenant has no notebook with the id."""
    return RefusedError(Refusal(404, "no_such_notebook", "there is no notebook with this id"))


def full(most: int) -> RefusedError:
    """The refusal if the server has as many notebooks as it may keep."""
    return RefusedError(
        Refusal(429, "notebooks_full", f"this server keeps at most {most} notebooks: delete one that is not needed")
    )


def too_large(most_bytes: int) -> RefusedError:
    """The refusal if the values in all of their places are too long."""
    return RefusedError(
        Refusal(
            413,
            "notebook_too_large",
            f"with all placeholders filled, the values take more than the {most_bytes} bytes that a request may have: "
            "use shorter values, or fewer placeholders",
        )
    )


def busy() -> RefusedError:
    """The refusal if other edits of the notebook always come first."""
    return RefusedError(Refusal(503, "notebook_busy", "the notebook is in use: try again", 1))


def tools_differ() -> RefusedError:
    """The refusal if a request gives other tools than its notebook, whose text contains its tools already."""
    return RefusedError(
        Refusal(400, "tools_differ", "a notebook's tools are set when it is created: leave them out, or give the same")
    )


def invalid(message: str) -> RefusedError:
    """The refusal if a request does not have the form that the message describes."""
    return RefusedError(Refusal(400, "invalid_request", message))


def _fits(key: str, value: Any) -> bool:
    kind = _OF_FIELD.get(key)
    if kind is None or (isinstance(value, bool) and kind in (int, float)):
        return False
    if kind is float:  # Python's JSON reader accepts NaN and Infinity, which are not JSON
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)


def _type_told(found: FieldType) -> dict[str, Any]:
    limits = {name: getattr(found, name) for name in _LIMITS if getattr(found, name) != getattr(_NO_LIMITS, name)}
    return {"kind": found.kind.value, **limits}
