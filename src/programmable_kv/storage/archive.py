"""Archives: one file with a few named byte strings, an uncompressed zip, so that its size bounds what is read."""

from __future__ import annotations

import struct
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path

from programmable_kv.errors import CorruptFileError, StorageError


def write_archive(file: Path, members: Mapping[str, bytes]) -> None:
    """Write the file, whole or not at all; an existing file is replaced.

    Raises:
        StorageError: the file cannot be written.
    """
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name, body in members.items():
                    archive.writestr(name, body)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot write {file}: {error}. The existing file, if any, is unchanged: make room or choose another place."
        ) from error


def read_archive(file: Path, names: tuple[str, ...]) -> tuple[bytes, ...]:
    """Read the members of an archive that has exactly these names.

    Nothing is unpacked to more than its size in the file.

    Raises:
        CorruptFileError: the file is not such an archive, or is damaged.
        StorageError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if sorted(info.filename for info in archive.infolist()) != sorted(names):
                raise CorruptFileError(f"{file} is not an exported skill: it must contain exactly {', '.join(names)}")
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in members.values()):
                raise CorruptFileError(
                    f"{file} is compressed or encrypted, but exported skills are not: export the skill again"
                )
            return tuple(archive.read(members[name]) for name in names)
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise CorruptFileError(f"{file} is damaged or not an exported skill: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error}") from error
