"""Blobs in memory: used to pickle notebooks, and a model for writing your own backend."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from programmable_kv.storage.files import Blob, Blobs


class MemoryBlobs(Blobs):
    """A dictionary of blobs. `used_at` counts uses instead of seconds."""

    def __init__(self, contents: Mapping[str, bytes] | None = None) -> None:
        super().__init__("memory")
        self.contents = dict(contents or {})
        self._clock = itertools.count(1)
        self._used = {name: next(self._clock) for name in self.contents}

    def _read(self, name: str) -> bytes:
        if name not in self.contents:
            raise FileNotFoundError(name)
        return self.contents[name]

    def _write(self, name: str, body: bytes) -> None:
        self.contents[name] = body
        self._touch(name)

    def _exists(self, name: str) -> bool:
        return name in self.contents

    def _list(self) -> Iterator[Blob]:
        yield from [Blob(name, len(body), self._used[name]) for name, body in self.contents.items()]

    def _remove(self, name: str) -> None:
        self.contents.pop(name, None)

    def _touch(self, name: str) -> None:
        if name in self.contents:
            self._used[name] = next(self._clock)
