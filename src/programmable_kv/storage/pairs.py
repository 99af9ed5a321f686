"""A pair: tensors, and the manifest that names them. How one is written, replaced and cleared up.

Tensors get a new name each time, and the manifest is replaced last, in one step. So a reader of a manifest finds the tensors
it was written with, or none (if they were replaced since), never those of another write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress

from programmable_kv.errors import StorageError
from programmable_kv.storage.files import Blobs

ABANDONED_SECONDS = 3600
"""Age from which unnamed tensors cannot be ones whose manifest is still to be written: that takes moments."""

Named = Callable[[], Collection[str] | None]
"""the names of the tensors that are in use; None when that is not known, and so nothing may be removed"""


def write_pair(blobs: Blobs, tensors: str, manifest: str, save: Callable[[], bytes], named: Named) -> None:
    """Write both, and remove the tensors that the manifest named before. If it fails, what was there is unchanged.

    Args:
        tensors, manifest: the names; that of the tensors is a new one.
        save: writes the tensors and returns the manifest's bytes.
        named: the tensors that the manifest names now.

    Raises:
        StorageError: one of the two cannot be written.
    """
    try:
        with blobs.writing():
            body = save()
            before = named()
            blobs.write(manifest, body)
            for replaced in before or ():
                with suppress(StorageError):  # the pair is written: what is left over is cleared up later
                    blobs.remove(replaced)
    except BaseException:
        with suppress(StorageError):
            if tensors not in (named() or ()):  # or else it failed after the manifest was written
                blobs.remove(tensors)
        raise


def clear_unused(blobs: Blobs, is_tensors: Callable[[str], bool], named: Named) -> None:
    """Remove tensors that are not in use, left by killed writers or by two who replaced the same pair.

    All of them if certainly no process is writing, else the old ones. What cannot be removed is left for the next time.
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
