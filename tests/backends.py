"""Backends of the tests: the smallest one there can be, and one that may only be read."""

from __future__ import annotations

from collections.abc import Iterator

from programmable_kv.storage.files import Blob, Blobs


class DictBlobs(Blobs):
    """The smallest backend: a dictionary. What a Redis or database backend would look like."""

    def __init__(self) -> None:
        super().__init__("a dictionary")
        self.held: dict[str, bytes] = {}
        self.used: dict[str, float] = {}
        self._clock = 1.0

    def _read(self, name: str) -> bytes:
        if name not in self.held:
            raise FileNotFoundError(name)
        return self.held[name]

    def _write(self, name: str, body: bytes) -> None:
        self.held[name] = body
        self._touch(name)

    def _exists(self, name: str) -> bool:
        return name in self.held

    def _list(self) -> Iterator[Blob]:
        yield from [Blob(name, len(body), self.used[name]) for name, body in self.held.items()]

    def _remove(self, name: str) -> None:
        self.held.pop(name, None)

    def _touch(self, name: str) -> None:
        if name in self.held:
            self._clock += 1
            self.used[name] = self._clock


class ReadOnlyBlobs(DictBlobs):
    """What was written before can be read; nothing else is allowed."""

    def _write(self, name: str, body: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    def _remove(self, name: str) -> None:
        raise PermissionError(13, "Permission denied")

    def _touch(self, name: str) -> None:
        raise PermissionError(13, "Permission denied")
