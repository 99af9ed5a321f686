"""Which headers go through. All do but those that belong to one connection, and those that the gateway answers for."""

from __future__ import annotations

from collections.abc import Iterable

Headers = tuple[tuple[bytes, bytes], ...]

_HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade",
    )
)  # fmt: skip
_LENGTH = b"content-length"
_CREDENTIALS = (b"authorization", b"x-api-key", b"api-key")
OWN = b"x-pkv-"
"""what the gateway's own headers begin with: they are for the gateway, or from it"""


def upwards(headers: Iterable[tuple[bytes, bytes]], host: bytes, body: bytes, *, rewritten: bool = False) -> Headers:
    """A client's headers as the upstream gets them: in their order, with the upstream's host and the length of the body.

    The length is said once, whatever the client said of it: a body without it would be read as the next request.
    """
    headers = tuple(headers)
    kept = _without_hops(headers, (b"host", b"expect", *((b"content-md5", b"digest") if rewritten else ())))
    sent = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in headers)
    if not (sent or body or rewritten):
        return ((b"host", host), *kept)
    length = str(len(body)).encode()
    places = [at for at, (name, _) in enumerate(kept) if name.lower() == _LENGTH]
    if not places or rewritten:
        others = tuple(each for each in kept if each[0].lower() != _LENGTH)
        return ((b"host", host), *others, (_LENGTH, length))
    measured = [(name, length) if at == places[0] else (name, value) for at, (name, value) in enumerate(kept)]
    return ((b"host", host), *(each for at, each in enumerate(measured) if at not in places[1:]))


def downwards(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """An upstream's headers as the client gets them."""
    return tuple((name.lower(), value) for name, value in _without_hops(headers, ()))


def value_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header; None where it was not sent."""
    return next((value for key, value in headers if key.lower() == name), None)


def credentials_of(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Those that say who asks the upstream."""
    return tuple((name, value) for name, value in headers if name.lower() in _CREDENTIALS)


def readable(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers as text, by their names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


def _without_hops(headers: Iterable[tuple[bytes, bytes]], also: tuple[bytes, ...]) -> Headers:
    headers = tuple(headers)
    named = {
        name.strip().lower() for key, value in headers if key.lower() == b"connection" for name in value.split(b",")
    }
    dropped = _HOP_BY_HOP | (named - {_LENGTH}) | set(also)
    return tuple((key, value) for key, value in headers if _kept(key.lower(), dropped))


def _kept(name: bytes, dropped: frozenset[bytes] | set[bytes]) -> bool:
    return name not in dropped and not name.startswith(OWN)
