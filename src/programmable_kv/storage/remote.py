"""Blobs at any URL that fsspec knows: object stores, `memory://`, sftp and others.

A put to an object store is atomic. If a driver's put is not, a partly written blob is detected by its digest and counts
as damaged. fsspec cannot record a use without the risk of creating a file, so the last use of a blob is the time it was
written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from programmable_kv.errors import InvalidArgumentError, StorageError
from programmable_kv.storage.files import Blob, Blobs

_PASSWORD = re.compile(r"://[^/@]*@")
"""User and password in a URL, which must not appear in messages."""


class FsspecBlobs(Blobs):
    """The blobs directly under a URL."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            InvalidArgumentError: fsspec does not know the protocol.
            StorageError: its driver is not installed or cannot connect.
        """
        super().__init__(_PASSWORD.sub("://***@", url))
        try:
            import fsspec

            self._files, root = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise InvalidArgumentError(f"cannot open {self.where}: {error}") from error
        except Exception as error:  # drivers raise the errors of their client libraries
            raise StorageError(
                f"cannot open {self.where}: {error}. Install the driver, or check the address."
            ) from error
        self._root = str(root).rstrip("/")
        self._made = False

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read(self, name: str) -> bytes:
        return bytes(self._files.cat_file(self._path(name)))

    def _write(self, name: str, body: bytes) -> None:
        if not self._made:
            self._files.makedirs(self._root, exist_ok=True)
            self._made = True
        self._files.pipe_file(self._path(name), body)

    def _exists(self, name: str) -> bool:
        self._files.invalidate_cache(self._root)  # other processes write here too
        return bool(self._files.exists(self._path(name)))

    def _list(self) -> Iterator[Blob]:
        self._files.invalidate_cache(self._root)
        try:
            found = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return
        for item in found:
            yield Blob(str(item["name"]).rstrip("/").rpartition("/")[2], int(item.get("size") or 0), _seconds(item))

    def _remove(self, name: str) -> None:
        self._files.rm_file(self._path(name))


def _seconds(item: dict[str, Any]) -> float:
    """When a listed file was written, in seconds since the epoch; drivers use several names for it. 0 if not stated."""
    moment = next((item[key] for key in ("mtime", "LastModified", "last_modified", "created") if item.get(key)), 0.0)
    if hasattr(moment, "timestamp"):
        return float(moment.timestamp())
    return float(moment) if isinstance(moment, int | float) else 0.0
