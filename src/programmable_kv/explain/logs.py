"""Reads requests from logs: JSON files with one request, JSONL files with one on each line, traces of hashed blocks.

A line is either the request's body, or an object as gateways and batch files write it, with the body in it (`request`,
`body`, `proxy_server_request`, ...) next to the response, the usage and the time.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from programmable_kv.errors import InvalidRequestError
from programmable_kv.explain.pieces import Piece, Request, Usage
from programmable_kv.explain.protocols import OPTIONS, RESPONSES, STORED, pieces_of, protocol_of
from programmable_kv.explain.traces import is_trace, requests_of_trace
from programmable_kv.explain.usage import usage_of, usage_of_stream

_HOLDERS = ("request", "body", "request_body", "proxy_server_request", "payload", "kwargs", "json")
_ANSWERS = ("response", "response_body", "body", "result", "message")
_STREAMS = ("body_raw", "body", "text", "content")
"""Keys under which a response may have a streamed answer as text."""
_TIMES = ("timestamp", "time", "ts", "created_at", "startTime", "start_time", "started_at", "date")
_ROUTES = ("url", "path", "route", "endpoint", "uri")
_SESSIONS = ("x-claude-code-session-id", "session_id", "session-id", "conversation_id", "x-session-id")
"""Headers and keys with the name of one conversation."""
_USER = "user_id"
"""The name of a user or an application, which often covers more than one conversation."""
_MILLISECONDS = 1e11
"""Larger times are in milliseconds: as seconds they would be thousands of years away."""
_DEPTH = 3


@dataclass
class LogReader:
    """Reads logs one after another into one list of requests.

    Equal pieces are stored once, since a long conversation sends its beginning in every request.
    """

    skip_bad_lines: bool = False
    requests: list[Request] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """One sentence for each line that was skipped."""
    _known: dict[bytes, Piece] = field(default_factory=dict, repr=False)
    _answers: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    """A response's id -> the items that the server puts before the input of a request that refers to this response."""

    def read(self, path: Path) -> None:
        """Read a file; `-` is standard input.

        Raises:
            InvalidRequestError: the file cannot be read or is empty; or a line is not a request and bad lines are not
                skipped.
        """
        try:
            data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"cannot read {path}: {error.strerror or error}") from error
        data = data.removeprefix(codecs.BOM_UTF8)
        if not data.strip():
            raise InvalidRequestError(f"{path} is empty: expected one request as JSON, or one request on each line")
        whole = None if _is_log(data) else _parsed(data)
        if isinstance(whole, Mapping) and is_trace(whole):
            self.requests += requests_of_trace(whole, path.name, len(self.requests) + 1)
            return
        if isinstance(whole, list):
            entries: Iterable[tuple[str, Any]] = ((f"{path.name}[{i}]", entry) for i, entry in enumerate(whole))
        elif isinstance(whole, Mapping):
            entries = [(path.name, whole)]
        else:
            lines = enumerate(BytesIO(data), start=1)
            entries = ((f"{path.name}:{number}", _Line(line)) for number, line in lines if line.strip())
        for source, entry in entries:
            self._take(entry, source)

    def add(self, entry: Mapping[str, Any], source: str) -> None:
        """Add one request, or one object that contains a request.

        Raises:
            InvalidRequestError: it is neither.
        """
        body, route = _body(entry, source)
        protocol = protocol_of(body, route)
        if protocol is None:
            raise InvalidRequestError(
                f"{source} is not a request: expected an object with 'messages', 'input' or 'prompt', or an object that has "
                f"one under 'request' or 'body'; found the keys {', '.join(sorted(map(str, entry))[:8]) or 'none'}"
            )
        if protocol == RESPONSES:
            body = self._joined(body)
        try:
            pieces = pieces_of(body, protocol)
        except (InvalidRequestError, RecursionError) as error:
            raise InvalidRequestError(f"{source}: {error}") from error
        answer = _answer(entry)
        self.requests.append(
            Request(
                len(self.requests) + 1,
                source,
                protocol,
                str(body.get("model") or entry.get("model") or ""),
                tuple(self._known.setdefault(piece.key + piece.path.encode(), piece) for piece in pieces),
                str(body.get("cache_salt") or ""),
                session_name(entry, body),
                _time(entry),
                _usage(entry, answer),
                {name: body[name] for name in OPTIONS if body.get(name) is not None},
                body,
            )
        )
        if protocol == RESPONSES and isinstance(answer.get("output"), list) and answer.get("id"):
            self._answers[str(answer["id"])] = [*_input(body), *answer["output"]]

    def _take(self, entry: Any, source: str) -> None:
        try:
            if isinstance(entry, _Line):
                entry = entry.parsed(source)
            if not isinstance(entry, Mapping):
                raise InvalidRequestError(f"{source} is {type(entry).__name__}; expected a JSON object")
            self.add(entry, source)
        except InvalidRequestError as error:
            if not self.skip_bad_lines:
                raise InvalidRequestError(f"{error}. `--skip-bad-lines` skips such lines and counts them.") from error
            self.skipped.append(str(error))

    def _joined(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The body with the items of the stored response that it refers to before its input, if the log has them."""
        earlier = self._answers.get(str(body.get(STORED) or ""))
        if earlier is None:
            return body
        return {**{key: value for key, value in body.items() if key != STORED}, "input": [*earlier, *_input(body)]}


@dataclass(frozen=True, slots=True)
class _Line:
    data: bytes

    def parsed(self, source: str) -> Any:
        try:
            return json.loads(self.data)
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"{source} is not UTF-8 text: {error}. Convert it first.") from error
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{source} is not JSON: {error}") from error


def _is_log(data: bytes) -> bool:
    """Whether the first line is a complete JSON object and other lines follow."""
    first, _, rest = data.lstrip().partition(b"\n")
    return isinstance(_parsed(first), Mapping) and bool(rest[:1000].strip())


def _parsed(text: str | bytes) -> Any:
    """The parsed JSON; None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _body(entry: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], str]:
    """The body in a line, and the route to which it was sent if the line has it."""
    route = ""
    for holder in islice(_nested(entry), 20):
        route = next((str(holder[key]) for key in _ROUTES if isinstance(holder.get(key), str)), route)
        if protocol_of(holder) is not None:
            return holder, route
    return entry, route


def _nested(entry: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    yield entry
    if depth < _DEPTH:
        for key in _HOLDERS:
            held = _object(entry.get(key))
            if held:
                yield from _nested(held, depth + 1)


def _object(value: Any) -> Mapping[str, Any]:
    """The value if it is an object, parsed if it was logged as a JSON string; otherwise an empty object."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parsed(value)
    return value if isinstance(value, Mapping) else {}


def _answer(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The response in a line: the object with choices, an output or a usage."""
    for key in ("response", "response_body", "result"):
        held = _object(entry.get(key))
        for answer in (held, *(_object(held.get(inner)) for inner in _ANSWERS)):
            if "usage" in answer or "output" in answer or "choices" in answer:
                return answer
    return {}


def _usage(entry: Mapping[str, Any], answer: Mapping[str, Any]) -> Usage | None:
    for given in (answer.get("usage"), entry.get("usage"), _object(entry.get("metadata")).get("usage")):
        found = usage_of(given)
        if found is not None:
            return found
    response = entry.get("response")
    held = _object(response)
    for text in (response, *(held.get(key) for key in _STREAMS)):
        found = usage_of_stream(text) if isinstance(text, str) else None
        if found is not None:
            return found
    return None


def session_name(entry: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """The client's own name for the conversation, or else for its user, from the headers, the entry or the body; empty
    if there is none."""
    metadata = _object(body.get("metadata"))
    named = conversation_name(entry, body) or _first((metadata,), _SESSIONS)
    own = () if body is entry else (body,)  # a log's line may have its own user
    return named or _first((*_headers(entry), *own, metadata), (_USER,)) or str(body.get("prompt_cache_key") or "")


def conversation_name(entry: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """The name under a key that stands for one conversation; empty if there is none.

    Names of users and applications, and names in `metadata`, may cover many conversations and are ignored.
    """
    return _first((*_headers(entry), entry, body), _SESSIONS)


def _headers(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    held = [_object(holder.get("headers")) for holder in (entry, _object(entry.get("request")))]
    return [{str(key).lower(): value for key, value in each.items()} for each in held]


def _first(holders: Iterable[Mapping[str, Any]], names: Iterable[str]) -> str:
    """The first non-empty string under one of the names in one of the holders."""
    found = (held.get(name) for held in holders for name in names)
    return next((each for each in found if isinstance(each, str) and each), "")


def _time(entry: Mapping[str, Any]) -> float | None:
    request = _object(entry.get("request"))
    for value in (holder.get(key) for holder in (entry, request) for key in _TIMES):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value / 1000 if value > _MILLISECONDS else float(value)
        if isinstance(value, str):
            try:
                found = datetime.fromisoformat(value)
            except ValueError:
                continue
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return None


def _input(body: Mapping[str, Any]) -> list[Any]:
    given = body.get("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return list(given) if isinstance(given, list) else []
