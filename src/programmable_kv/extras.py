"""Optional dependencies: what is missing is told in one line, with the command that installs it."""

from __future__ import annotations

from importlib.util import find_spec

from programmable_kv.errors import MissingExtraError


def require_extra(extra: str, *modules: str) -> None:
    """Check that an extra's modules can be imported, without importing them.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(missing_message(extra, missing))


def missing_message(extra: str, missing: list[str]) -> str:
    """The sentence for missing modules of an extra."""
    are = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {are} not installed. Run: pip install 'programmable-kv[{extra}]'"
