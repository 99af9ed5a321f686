"""One lock for each transformers model, however many engines wrap it.

Two forwards of one model must not run at the same time: rotary modules write their frequency tables in place (LongRoPE,
dynamic NTK), and reading attention may switch the implementation. Engines hold this lock during each forward. Code that
runs the model without an engine (for example its own `generate`) does not.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def lock_of(model: Any) -> threading.RLock:
    """The reentrant lock of a model: every caller gets the same one, and it is freed with the model."""
    with _guard:
        lock = _locks.get(model)
        if lock is None:
            lock = _locks[model] = threading.RLock()
        return lock
