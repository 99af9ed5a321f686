"""A backend of the tests: one that may only be read."""

from __future__ import annotations

from programmable_kv.storage.memory import MemoryBlobs


class ReadOnlyBlobs(MemoryBlobs):
    """What was written before can be read; nothing else is allowed."""

    def _write(self, name: str, body: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    def _remove(self, name: str) -> None:
        raise PermissionError(13, "Permission denied")

    def _touch(self, name: str) -> None:
        raise PermissionError(13, "Permission denied")
