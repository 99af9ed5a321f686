"""Dates that a client gives to the upstream's chat template, which writes them near the top of the prompt."""

from __future__ import annotations

from collections.abc import Mapping

from programmable_kv.serve.rewriting.body import Body, Spot, written
from programmable_kv.serve.rewriting.moments import is_moment

_MEMBER = "chat_template_kwargs"


def dates_of(body: Body) -> dict[str, str]:
    """The template's variables whose values are a date or a time and nothing else, such as `date_string`."""
    given = body.data.get(_MEMBER)
    if not isinstance(given, Mapping):
        return {}
    return {name: value for name, value in given.items() if isinstance(value, str) and is_moment(value)}


def with_dates(body: Body, dates: Mapping[str, str]) -> tuple[Spot, str]:
    """The place of the template's variables in the body, and the variables with other dates."""
    return body.spots[_MEMBER], written({**body.data[_MEMBER], **dates})
