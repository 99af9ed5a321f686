"""The models that are loaded in this process, by fingerprint. Unpickled objects find their model here."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol, TypeVar

from programmable_kv.errors import ModelUnavailableError


class Fingerprinted(Protocol):
    """An object with a fingerprint."""

    @property
    def fingerprint(self) -> str: ...


_loaded: weakref.WeakValueDictionary[str, Fingerprinted] = weakref.WeakValueDictionary()
_guard = threading.Lock()
AnyModel = TypeVar("AnyModel", bound=Fingerprinted)


def remember(model: Fingerprinted) -> None:
    """Register a model by its fingerprint for as long as it is referenced. The latest of several with one wins."""
    with _guard:
        _loaded[model.fingerprint] = model


def loaded_model(fingerprint: str, kind: type[AnyModel], name: str) -> AnyModel:
    """The loaded model with this fingerprint.

    Args:
        name: the model's name, for the error message.

    Raises:
        ModelUnavailableError: the model is not loaded in this process.
    """
    with _guard:
        found = _loaded.get(fingerprint)
    if not isinstance(found, kind):
        raise ModelUnavailableError(
            f"the model '{name}' ({fingerprint[:8]}) is not loaded in this process, and a pickled notebook does not "
            "contain it: load it with load_model first, and keep a reference to it."
        )
    return found
