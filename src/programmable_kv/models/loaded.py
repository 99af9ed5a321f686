"""The models that are loaded in this process, by fingerprint: what is read from a pickle finds its model here."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol, TypeVar

from programmable_kv.errors import ModelUnavailableError


class Fingerprinted(Protocol):
    """What is remembered: anything with a fingerprint."""

    @property
    def fingerprint(self) -> str: ...


_loaded: weakref.WeakValueDictionary[str, Fingerprinted] = weakref.WeakValueDictionary()
_guard = threading.Lock()
AnyModel = TypeVar("AnyModel", bound=Fingerprinted)


def remember(model: Fingerprinted) -> None:
    """Let a model be found by its fingerprint as long as someone holds it. The latest one with a fingerprint is found."""
    with _guard:
        _loaded[model.fingerprint] = model


def loaded_model(fingerprint: str, kind: type[AnyModel], name: str) -> AnyModel:
    """The loaded model with this fingerprint.

    Args:
        name: what to call it in a message.

    Raises:
        ModelUnavailableError: it is not loaded in this process.
    """
    with _guard:
        found = _loaded.get(fingerprint)
    if not isinstance(found, kind):
        raise ModelUnavailableError(
            f"the model '{name}' ({fingerprint[:8]}) is not loaded in this process, and a pickled notebook does not hold it: "
            "load it with load_model first, and keep it."
        )
    return found
