"""Optional dependencies: what is missing is named in one line, with the command that installs it."""

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
}
"""top-level module -> the extra that installs it"""
_FOR_MODELS = ("torch", "transformers")
"""what the package itself needs to run a model, and the gateway's container does without"""


def require_extra(extra: str, *modules: str) -> None:
    """Check that an extra's modules can be imported, without importing them.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(missing_message(extra, missing))


def require_model_packages(instead: str = "") -> None:
    """Check that a model can be run. The gateway's container, for one, installs nothing of that.

    Args:
        instead: what to do without a model.

    Raises:
        MissingExtraError: torch or transformers is not installed.
    """
    missing = [module for module in _FOR_MODELS if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{missing_message('embedded', missing)}{instead}")


def missing_message(extra: str, missing: list[str]) -> str:
    """The sentence for missing modules of an extra."""
    are = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {are} not installed. Run: pip install 'programmable-kv[{extra}]'"


def extra_missing_in(error: ModuleNotFoundError) -> str | None:
    """The message for a failed import, if an extra or a full installation would have prevented it."""
    module = (error.name or "").partition(".")[0]
    if module in _FOR_MODELS:
        return missing_message("embedded", [module])
    return missing_message(EXTRA_OF[module], [module]) if module in EXTRA_OF else None
