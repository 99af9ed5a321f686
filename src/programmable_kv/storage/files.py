"""Named blobs under one root: the interface through which the skill store and saved notebooks use a backend.

A blob is written whole or not at all, and has a flat name (no folders). `blobs_at` opens a local folder or any fsspec
URL. Another backend (Redis, a database) is one file with a subclass of `Blobs` that implements `_read`, `_write`,
`_exists`, `_list` and `_remove`, and `_touch` if the backend can record a use. Pass an instance to `SkillStore` instead
of a folder. This module checks names and translates the backend's errors for all backends.
"""

from __future__ import annotations

import errno
import hashlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from programmable_kv.errors import CorruptFileError, InvalidArgumentError, StorageError

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,127}\Z")
"""A valid name: letters, digits, '_', '-' and single dots; no separator, no leading dot."""
LEFTOVER = re.compile(r"\..*\.[0-9a-f]{32}\.(partial|aside)\Z")
"""Files that a killed writer may leave in a local folder: they are hidden and never blobs."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_LOCAL_SCHEMES = ("file://", "local://")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob in a listing."""

    name: str
    nbytes: int
    used_at: float
    """when it was last touched or written, in seconds since the epoch; 0 if the backend does not say"""


class Blobs(ABC):
    """Named blobs under one root."""

    def __init__(self, where: str) -> None:
        self.where = where
        """the root, for messages"""

    # -- what a backend implements. Names are valid. It may raise any error of its own. -------------------------------

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """The blob's content. Raises FileNotFoundError if there is no blob of that name."""

    @abstractmethod
    def _write(self, name: str, body: bytes) -> None:
        """Write the whole body or nothing; a reader sees the old blob or the new one."""

    @abstractmethod
    def _exists(self, name: str) -> bool: ...

    @abstractmethod
    def _list(self) -> Iterable[Blob]:
        """All blobs; none if the root does not exist yet."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Remove the blob if it exists."""

    def _touch(self, name: str) -> None:  # noqa: B027 (not every backend can)
        """Record a use of a blob that exists. Never creates one."""

    # -- what callers use ---------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """A blob's content; None if there is no blob of that name.

        Raises:
            CorruptFileError: there is a folder of that name.
            StorageError: the blob cannot be read.
        """
        with self.translated("read", checked_name(name)):
            try:
                return self._read(name)
            except FileNotFoundError:
                return None

    def write(self, name: str, body: bytes) -> None:
        """Write a blob, whole or not at all; an existing blob of that name is replaced.

        Raises:
            StorageError: the blob cannot be written (no room, no permission). An existing blob is unchanged.
        """
        with self.translated("write", checked_name(name), missing=False):
            self._write(name, body)

    def write_from(self, name: str, save: Callable[[Path], object]) -> str:
        """Write a blob from a local file that `save` writes, so that it is never in memory twice; returns its SHA-256.

        Raises:
            StorageError: as in `write`.
        """
        with self.translated("write", checked_name(name), missing=False), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            save(path)
            self._write(name, path.read_bytes())
            return sha256_of(path)

    def exists(self, name: str) -> bool:
        with self.translated("look for", checked_name(name), missing=False):
            return self._exists(name)

    def list(self) -> Iterator[Blob]:
        """All blobs with a valid name; anything else in the root does not belong to this package.

        Raises:
            StorageError: the root cannot be read, or is not a folder.
        """
        with self.translated("list", "", missing=False):
            found = [blob for blob in self._list() if _NAME.match(blob.name)]
        return iter(found)

    def foreign(self, ours: Callable[[str], bool]) -> str | None:
        """The name of something under the root that is neither `ours` nor left by a killed writer; None if none."""
        with self.translated("list", "", missing=False):
            return next((it.name for it in self._list() if not ours(it.name) and not LEFTOVER.match(it.name)), None)

    def touch(self, name: str) -> None:
        """Record a use if possible. Does nothing for a blob that is gone or may not be written."""
        with suppress(StorageError, FileNotFoundError), self.translated("touch", checked_name(name)):
            self._touch(name)

    def remove(self, name: str) -> None:
        """Remove a blob; it is no error if it does not exist.

        Raises:
            StorageError: the blob cannot be removed.
        """
        with suppress(FileNotFoundError), self.translated("remove", checked_name(name)):
            self._remove(name)

    def local_path(self, name: str) -> Path | None:
        """A local file with the blob's content, which can be memory-mapped instead of read; None if there is none."""
        return None

    def writing(self) -> AbstractContextManager[object]:
        """A block in which blobs that belong together are written; other processes may write at the same time."""
        return nullcontext()

    def alone(self) -> AbstractContextManager[bool]:
        """A block that gets True if certainly no other process is inside a `writing` block. Never waits."""
        return nullcontext(False)

    def sweep(self) -> None:  # noqa: B027 (most backends have nothing to sweep)
        """Inside `alone`: remove files that killed writers left behind and that never became blobs."""

    @contextmanager
    def translated(self, doing: str, name: str, *, missing: bool = True) -> Iterator[None]:
        """Translate the backend's errors into this package's. They have no common base, since drivers raise any error.

        `missing`: a FileNotFoundError means that there is no such blob, and is passed on to the caller.
        """
        what = f"{name} in {self.where}" if name else self.where
        try:
            yield
        except (StorageError, MemoryError):
            raise
        except FileNotFoundError as error:
            if missing:
                raise
            raise StorageError(f"cannot {doing} {what}: {error}") from error
        except IsADirectoryError as error:
            raise CorruptFileError(f"cannot {doing} {what}: a folder has that name. Move the folder away.") from error
        except Exception as error:
            raise StorageError(
                f"cannot {doing} {what}: {' '.join(str(error).split()) or type(error).__name__}. {_advice(error)}"
            ) from error


def _advice(error: Exception) -> str:
    number = getattr(error, "errno", None)
    # safetensors writes files in Rust and gives the error number in its message.
    if number in _NO_ROOM or any(f"os error {code})" in str(error) for code in _NO_ROOM):
        return "What was stored before is unchanged: make room or choose another place, and run it again."
    if number in _REFUSED:
        return "Change its permissions, or choose another place."
    return "What was stored before is unchanged."


def checked_name(name: str) -> str:
    """
    Raises:
        InvalidArgumentError: `name` is not a valid flat name of a blob.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidArgumentError(
            "a stored file's name must be up to 128 letters, digits, '_', '-' and single dots, without a folder; got "
            f"{name!r}"
        )
    return name


def sha256_of(source: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes, in hexadecimal digits."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blobs_at(where: str | Path | Blobs) -> Blobs:
    """Open a place: a local folder (`~` is expanded), an fsspec URL such as `s3://bucket/skills`, or your own `Blobs`.

    Nothing is created before the first write.

    Raises:
        InvalidArgumentError: `where` is none of these, a URL with an unknown protocol, or a URL given as a `Path`,
            which drops a slash.
        StorageError: the URL's driver is not installed or cannot connect.
    """
    if isinstance(where, Blobs):
        return where
    if not isinstance(where, str | Path) or not str(where):
        raise InvalidArgumentError(f"a storage location must be a folder, a URL or `Blobs`; got {where!r}")
    from programmable_kv.storage.local import LocalBlobs

    text = str(where)
    if text.startswith(_LOCAL_SCHEMES):
        text = text.partition("://")[2]
    elif "://" in text and isinstance(where, str):
        from programmable_kv.storage.remote import FsspecBlobs

        return FsspecBlobs(text)
    elif _SCHEME.match(text):
        raise InvalidArgumentError(
            f"{text!r} looks like a URL with only one slash. Give a URL as a string with '://' (a `Path` drops a "
            f"slash), or a local folder as './{text}'."
        )
    return LocalBlobs(Path(text).expanduser())
