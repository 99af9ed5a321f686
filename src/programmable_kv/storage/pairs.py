"""Pairs of a tensors blob and the manifest that names it: writes, replaces and cleans up such pairs.

Tensors get a new name for each write, and the manifest is replaced last, in one step. So a reader of a manifest finds
the tensors that it was written with, or none (if they were replaced in the meantime), but never those of another write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress

from programmable_kv.errors import StorageError
from programmable_kv.storage.files import Blobs

ABANDONED_SECONDS = 3600
"""Age from which tensors that no manifest names are abandoned: a write adds its manifest within moments."""

Named = Callable[[], Collection[str] | None]
"""Returns the names of the tensors in use; None if they are not known, in which case nothing may be removed."""


def write_pair(blobs: Blobs, tensors: str, manifest: str, save: Callable[[], bytes], named: Named) -> None:
    """Write both, and remove the tensors that the manifest named before. On failure the old pair is unchanged.

    Args:
        tensors, manifest: the names of the two blobs; the tensors' name must be new.
        save: writes the tensors and returns the manifest's bytes.
        named: returns the names of the tensors in the current manifest.

    Raises:
        StorageError: one of the two cannot be written.
    """
    try:
        with blobs.writing():
            body = save()
            before = named()
            blobs.write(manifest, body)
            for replaced in before or ():
                with suppress(StorageError):  # the pair is written; leftovers are removed later
                    blobs.remove(replaced)
    except BaseException:
        with suppress(StorageError):
            if tensors not in (named() or ()):  # otherwise it failed after the manifest was written
                blobs.remove(tensors)
        raise


def clear_unused(blobs: Blobs, is_tensors: Callable[[str], bool], named: Named) -> None:
    """Remove unused tensors, left by killed writers or by two writers that replaced the same pair.

    Removes all of them if certainly no process is writing, else only old ones. Those that cannot be removed now stay
    until the next call.
    """
    with suppress(StorageError), blobs.alone() as alone:
        if alone:
            blobs.sweep()
        found = [blob for blob in blobs.list() if is_tensors(blob.name)]
        names = named() if found else None
        if names is None:
            return
        for blob in found:
            old = 0 < blob.used_at < time.time() - ABANDONED_SECONDS
            if blob.name not in names and (alone or old):
                with suppress(StorageError):
                    blobs.remove(blob.name)
