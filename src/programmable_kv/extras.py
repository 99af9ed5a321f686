"""Optional dependencies: a missing package is reported in one line, with the command that installs it."""

from __future__ import annotations

from importlib.util import find_spec

from programmable_kv.errors import MissingExtraError

EXTRA_OF = {
    "gguf": "embedded",
    "peft": "embedded",
    "accelerate": "embedded",
    "typer": "cli",
    "click": "cli",
    "rich": "cli",
    "scipy": "lab",
    "statsmodels": "lab",
    "sklearn": "lab",
    "matplotlib": "lab",
    "starlette": "serve",
    "uvicorn": "serve",
    "httptools": "serve",
    "prometheus_client": "serve",
    "psycopg": "postgres",
}
"""Top-level module -> the extra that installs it."""
_FOR_MODELS = ("torch", "transformers")
"""Packages that are needed to run a model; the gateway's container works without them."""


def require_extra(extra: str, *modules: str) -> None:
    """Check that an extra's modules can be imported, without importing them.

    Raises:
        MissingExtraError: a module is not installed.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(missing_message(extra, missing))


def require_model_packages(instead: str = "") -> None:
    """Check that the packages that run a model are installed. The gateway's container, for example, has none of them.

    Args:
        instead: text that is appended to the message: what to do without a model.

    Raises:
        MissingExtraError: torch or transformers is not installed.
    """
    missing = [module for module in _FOR_MODELS if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{missing_message('embedded', missing)}{instead}")


def missing_message(extra: str, missing: list[str]) -> str:
    """The message about missing modules of an extra."""
    are = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {are} not installed. Run: pip install 'programmable-kv[{extra}]'"


def extra_missing_in(error: ModuleNotFoundError) -> str | None:
    """The message about a failed import, if an extra or a full installation provides the module; else None."""
    module = (error.name or "").partition(".")[0]
    if module in _FOR_MODELS:
        return missing_message("embedded", [module])
    return missing_message(EXTRA_OF[module], [module]) if module in EXTRA_OF else None
