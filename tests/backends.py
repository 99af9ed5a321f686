"""A storage backend for tests that may only be read."""

from __future__ import annotations

from programmable_kv.storage.memory import MemoryBlobs


class ReadOnlyBlobs(MemoryBlobs):
    """Blobs that can be read; writing and removing are refused."""

    def _write(self, name: str, body: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    def _remove(self, name: str) -> None:
        raise PermissionError(13, "Permission denied")

    def _touch(self, name: str) -> None:
        raise PermissionError(13, "Permission denied")
