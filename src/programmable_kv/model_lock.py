"""One lock for each transformers model, however many engines wrap it.

Two forwards of one model are not safe beside each other: rotary modules write their frequency tables in place (LongRoPE,
dynamic NTK), and reading attention may switch the implementation. Engines hold this lock during each forward. Whoever runs the
model without an engine (its own `generate`, say) does not.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def lock_of(model: Any) -> threading.RLock:
    """The lock of a model: the same for every caller, reentrant, gone when the model is."""
    with _guard:
        lock = _locks.get(model)
        if lock is None:
            lock = _locks[model] = threading.RLock()
        return lock
