"""Who may use a gateway: holders of API keys (only hashes are kept), or without keys any program on this machine."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from programmable_kv.errors import InvalidValueError
from programmable_kv.serve.headers import Headers, value_of
from programmable_kv.serve.refusal import Refusal, RefusedError

_OWN_HEADER = b"x-pkv-key"
_ANYBODY = "local"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MARK = "sha256:"
_RATE = "per-minute="
_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,9})?")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A tenant's name and the SHA-256 of its key. Keys are random and long, so that one round of a fast hash is enough."""

    name: str
    digest: str = field(repr=False)
    per_minute: float | None = None
    """requests that the key may make in a minute; None where it has no rate of its own"""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The tenant who asks, and the headers for the upstream, without the gateway's own key."""

    tenant: str
    headers: Headers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Access:
    """Decides who may use a gateway."""

    keys: tuple[ApiKey, ...] = ()
    upstream_key: str = field(default="", repr=False)

    def admit(self, headers: Headers) -> Admitted:
        """Let a request in.

        The key may stand in `x-pkv-key`; then the client's own credentials go through to the upstream. Otherwise the key
        is taken from where clients put theirs (`Authorization: Bearer`, `x-api-key`), and those headers are removed. In
        both cases the upstream's key, where there is one, replaces the client's credentials.

        Raises:
            RefusedError: no key or an unknown one; without keys, a browser's request for a page from elsewhere.
        """
        if not self.keys:
            _refuse_web_pages(headers)
            return Admitted(_ANYBODY, self._with_upstream_key(headers) if self.upstream_key else headers)
        own = value_of(headers, _OWN_HEADER)
        if own is not None:
            tenant = self._tenant(own)
            return Admitted(tenant, self._with_upstream_key(headers) if self.upstream_key else headers)
        tenant = self._tenant(*_credentials(headers))
        return Admitted(tenant, self._with_upstream_key(headers))

    def _tenant(self, *given: bytes) -> str:
        """The tenant of the first known key. Every key is compared with every tenant's: time tells nothing."""
        found = ""
        for key in given:
            digest = sha256(key).hexdigest()
            for known in self.keys:
                if hmac.compare_digest(digest, known.digest):
                    found = found or known.name
        if not found:
            raise RefusedError(Refusal(401, "invalid_api_key", "send a valid API key of this gateway"))
        return found

    def _with_upstream_key(self, headers: Headers) -> Headers:
        """The headers without the client's credentials, and with the upstream's key where there is one."""
        anthropic = value_of(headers, b"x-api-key") is not None or value_of(headers, b"anthropic-version") is not None
        kept = tuple((name, value) for name, value in headers if name.lower() not in (b"authorization", b"x-api-key"))
        if not self.upstream_key:
            return kept
        key = self.upstream_key.encode()
        return (*kept, (b"x-api-key", key) if anthropic else (b"authorization", b"Bearer " + key))


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file: on each line a name, `sha256:` with the key's hash, and perhaps `per-minute=` with a rate.
    `#` begins a comment.

    Raises:
        InvalidValueError: the file cannot be read, has no key, or a line is not a key. The message never shows the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"cannot read the API keys in {path}: {error}") from error
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, mark = (words[0], words[1]) if len(words) in (2, 3) else ("", "")
        rate = words[2].removeprefix(_RATE) if len(words) == 3 else ""
        rated = len(words) == 2 or (words[-1].startswith(_RATE) and bool(_NUMBER.fullmatch(rate)) and float(rate) > 0)
        if not (
            rated and _NAME.fullmatch(name) and mark.startswith(_MARK) and _DIGEST.fullmatch(mark.removeprefix(_MARK))
        ):
            raise InvalidValueError(
                f"line {number} of {path} is not an API key: expected a name and `sha256:` with 64 hexadecimal digits, as "
                "`pkv serve-key NAME` prints them, and optionally `per-minute=60`"
            )
        if name in keys:
            raise InvalidValueError(
                f"line {number} of {path} repeats the name of a tenant: give each line its own name"
            )
        keys[name] = ApiKey(name, mark.removeprefix(_MARK), float(rate) if rate else None)
    if not keys:
        raise InvalidValueError(f"{path} contains no API key: create one with `pkv serve-key NAME`")
    return tuple(keys.values())


def rates_of(keys: Iterable[ApiKey]) -> dict[str, float]:
    """The rates of keys that have one of their own, by tenant."""
    return {key.name: key.per_minute for key in keys if key.per_minute is not None}


def new_key(name: str) -> tuple[str, str]:
    """A new random key, and the line for the file of keys.

    Raises:
        InvalidValueError: the name is empty, too long, or has other characters than letters, digits, `.`, `_` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise InvalidValueError(f"a tenant's name must have 1 to 64 letters, digits, '.', '_' and '-', got {name!r}")
    key = f"pkv-{secrets.token_urlsafe(32)}"
    return key, f"{name} {_MARK}{sha256(key.encode()).hexdigest()}"


def _credentials(headers: Headers) -> Iterable[bytes]:
    bearer = value_of(headers, b"authorization") or b""
    if bearer[:7].lower() == b"bearer ":
        yield bearer[7:].strip()
    key = value_of(headers, b"x-api-key")
    if key is not None:
        yield key.strip()


def _refuse_web_pages(headers: Headers) -> None:
    """Refuse requests that a browser makes for a page from elsewhere: another origin, or a foreign name for this machine."""
    origin = value_of(headers, b"origin")
    names = [_host_of(b"//" + (value_of(headers, b"host") or b"localhost"))]
    names += [_host_of(origin)] if origin is not None else []
    if not all(is_loopback(name) for name in names):
        raise RefusedError(
            Refusal(
                403,
                "not_local",
                "a gateway without API keys answers only requests to 127.0.0.1 or localhost, and none from other web pages",
            )
        )


def _host_of(url: bytes) -> str:
    try:
        return urlsplit(url.decode("ascii")).hostname or ""
    except ValueError:  # also what is not ASCII
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, as seen from itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
