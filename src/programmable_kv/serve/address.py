"""The addresses of an upstream and of a database of state."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from programmable_kv.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Address:
    """Where requests go.

    Raises:
        InvalidArgumentError: the URL is not http or https, is not ASCII, or has a user, password, query or fragment.
    """

    url: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgumentError(
                f"the upstream must be an address such as http://127.0.0.1:8000, got {self.url!r}"
            )
        if not self.url.isascii():
            raise InvalidArgumentError(f"the upstream's address must be ASCII, got {self.url!r}")
        if parts.query or parts.fragment or parts.username or parts.password:
            raise InvalidArgumentError(
                "the upstream's address must not have a user, password, query or fragment: pass a key with --upstream-key-env"
            )

    @property
    def host(self) -> bytes:
        """Host name and port, as they stand in the `Host` header."""
        return urlsplit(self.url).netloc.encode("ascii")

    @property
    def base_path(self) -> bytes:
        """The path before `/v1`. An address that ends in `/v1` means the same as one without."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1").encode()

    @property
    def plain(self) -> str:
        """The address in one form, however it was written: for comparing addresses."""
        return f"{urlsplit(self.url).scheme}://{self.host.decode().lower()}{self.base_path.decode()}"


_DATABASES = ("postgresql://", "postgres://")


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """The URL of a database where several servers keep one state. It may contain a password, so it is never shown."""

    url: str = field(repr=False)


def place_of(text: str) -> Path | DatabaseAddress:
    """Where the state is kept: a database where the text is a PostgreSQL URL, otherwise a file.

    Raises:
        InvalidArgumentError: the text is a URL of another kind.
    """
    if text.startswith(_DATABASES):
        return DatabaseAddress(text)
    scheme, mark, _ = text.partition("://")
    if mark and scheme.isalnum():
        raise InvalidArgumentError(f"the state must be a file or a database at postgresql://, not at {scheme}://")
    return Path(text)
