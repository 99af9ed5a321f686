"""Blobs in a local folder.

A blob is written to a temporary file, flushed to the disk and renamed, so that a killed process (or a power failure)
leaves the old blob or the new one. A lock on the folder shows whether a process is writing, so that cleaning up removes
only leftovers. Readers take no lock.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from programmable_kv.storage.files import LEFTOVER, Blob, Blobs, checked_name, sha256_of

if sys.platform != "win32":
    import fcntl

_PARTIAL, _ASIDE = ".partial", ".aside"


class LocalBlobs(Blobs):
    """Blobs in a folder, which is created on the first write."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root

    def _read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def _write(self, name: str, body: bytes) -> None:
        with self._partial(name) as partial, partial.open("wb") as file:
            file.write(body)

    def write_from(self, name: str, save: Callable[[Path], object]) -> str:
        with self.translated("write", checked_name(name), missing=False), self._partial(name) as partial:
            save(partial)
            return sha256_of(partial)

    @contextmanager
    def _partial(self, name: str) -> Iterator[Path]:
        """A temporary file to write; at the end of the block it is renamed to `name`."""
        self.root.mkdir(parents=True, exist_ok=True)
        partial = self.root / f".{name}.{uuid.uuid4().hex}{_PARTIAL}"
        with self._locked(alone=False):  # without the lock, a process that cleans up would take the file for a leftover
            try:
                yield partial
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
                try:
                    partial.replace(self.root / name)
                except OSError:
                    if not (self.root / name).is_dir():
                        raise
                    self._discard(self.root / name)
                    partial.replace(self.root / name)
            finally:
                partial.unlink(missing_ok=True)

    def _exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def _list(self) -> Iterator[Blob]:
        try:
            found = list(os.scandir(self.root))
        except FileNotFoundError:
            return
        for item in found:
            try:
                status = item.stat()
            except FileNotFoundError:
                continue
            yield Blob(item.name, status.st_size, status.st_mtime)

    def _touch(self, name: str) -> None:
        os.utime(self.root / name)

    def _remove(self, name: str) -> None:
        self._discard(self.root / name)

    def _discard(self, path: Path) -> None:
        """Remove a file. A folder of that name that is not empty is moved aside, not removed."""
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        try:
            path.rmdir()
        except OSError:
            path.rename(self.root / f".{path.name}.{uuid.uuid4().hex}{_ASIDE}")

    def local_path(self, name: str) -> Path | None:
        path = self.root / name
        return path if path.is_file() else None

    def writing(self) -> AbstractContextManager[object]:
        with self.translated("make", "", missing=False):
            self.root.mkdir(parents=True, exist_ok=True)
        return self._locked(alone=False)

    def alone(self) -> AbstractContextManager[bool]:
        return self._locked(alone=True)

    def sweep(self) -> None:
        with self.translated("list", "", missing=False):
            for path in self.root.glob(f".*{_PARTIAL}"):
                if LEFTOVER.match(path.name):
                    path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, *, alone: bool) -> Iterator[bool]:
        """Lock the folder: shared to write, exclusive (without waiting) to clean up. Yields whether it is held."""
        if sys.platform == "win32":  # folders cannot be locked: cleaning up goes by age
            yield False
            return
        try:
            handle = os.open(self.root, os.O_RDONLY)
        except OSError:
            yield False
            return
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
                held = True
            except OSError:  # a process is writing, or the file system has no locks
                held = False
            yield held
        finally:
            os.close(handle)
