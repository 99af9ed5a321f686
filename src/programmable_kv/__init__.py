"""programmable-kv: edit the content of a transformer's KV cache at the price of the tokens touched.

Importing this package is cheap: the module of a public name, and with it torch, is imported when the name is first
used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, for type checkers and editors; a test compares this list with the table below
    from programmable_kv.account import Account
    from programmable_kv.agent.agent import Agent, Turn
    from programmable_kv.cache.rows import Rows
    from programmable_kv.cache.span import Span
    from programmable_kv.edits.modes import Mode
    from programmable_kv.edits.ranking import AttentionInfluence, RandomOrder, Recency
    from programmable_kv.edits.seam import SeamRepair
    from programmable_kv.engine import Engine
    from programmable_kv.errors import (
        AlreadyPrefilledError,
        CacheBufferError,
        ContextOverflowError,
        CorruptFileError,
        ExperimentError,
        FingerprintMismatchError,
        FrequencyRegimeError,
        InputError,
        InvalidArgumentError,
        InvalidEditError,
        InvalidOptionsError,
        InvalidRequestError,
        InvalidValueError,
        MissingDataError,
        MissingExtraError,
        ModelError,
        ModelUnavailableError,
        NonFiniteLogitsError,
        NotPrefilledError,
        OutOfStepError,
        ProgrammableKVError,
        QueueFullError,
        RecordError,
        StateError,
        StorageError,
        TemplateError,
        TrainingError,
        UnknownFieldError,
        UnknownPartError,
        UnknownSkillError,
        UnsupportedModelError,
        UnverifiedError,
    )
    from programmable_kv.explain.explain import explain_miss
    from programmable_kv.explain.report import MissCause, MissReport, RequestFinding
    from programmable_kv.model_queue import ModelQueue
    from programmable_kv.models.load import Model, load_model, wrap_model
    from programmable_kv.notebook.decision import Decision
    from programmable_kv.notebook.notebook import Notebook
    from programmable_kv.notebook.suggesting import SuggestedReader, Suggestions
    from programmable_kv.prompt.fields import Field
    from programmable_kv.prompt.readers import Reader
    from programmable_kv.skills.skill import Skill
    from programmable_kv.skills.store import SkillStore
    from programmable_kv.states import TokenState

__version__ = "0.1.0"

_MODULE_OF = {
    "Account": "account",
    "Agent": "agent.agent",
    "AlreadyPrefilledError": "errors",
    "AttentionInfluence": "edits.ranking",
    "CacheBufferError": "errors",
    "ContextOverflowError": "errors",
    "CorruptFileError": "errors",
    "Decision": "notebook.decision",
    "Engine": "engine",
    "ExperimentError": "errors",
    "Field": "prompt.fields",
    "FingerprintMismatchError": "errors",
    "FrequencyRegimeError": "errors",
    "InputError": "errors",
    "InvalidArgumentError": "errors",
    "InvalidEditError": "errors",
    "InvalidOptionsError": "errors",
    "InvalidRequestError": "errors",
    "InvalidValueError": "errors",
    "MissCause": "explain.report",
    "MissReport": "explain.report",
    "MissingDataError": "errors",
    "MissingExtraError": "errors",
    "Mode": "edits.modes",
    "Model": "models.load",
    "ModelError": "errors",
    "ModelQueue": "model_queue",
    "ModelUnavailableError": "errors",
    "NonFiniteLogitsError": "errors",
    "NotPrefilledError": "errors",
    "Notebook": "notebook.notebook",
    "OutOfStepError": "errors",
    "ProgrammableKVError": "errors",
    "QueueFullError": "errors",
    "RandomOrder": "edits.ranking",
    "Reader": "prompt.readers",
    "Recency": "edits.ranking",
    "RecordError": "errors",
    "RequestFinding": "explain.report",
    "Rows": "cache.rows",
    "SeamRepair": "edits.seam",
    "Skill": "skills.skill",
    "SkillStore": "skills.store",
    "Span": "cache.span",
    "StateError": "errors",
    "StorageError": "errors",
    "SuggestedReader": "notebook.suggesting",
    "Suggestions": "notebook.suggesting",
    "TemplateError": "errors",
    "TokenState": "states",
    "TrainingError": "errors",
    "Turn": "agent.agent",
    "UnknownFieldError": "errors",
    "UnknownPartError": "errors",
    "UnknownSkillError": "errors",
    "UnsupportedModelError": "errors",
    "UnverifiedError": "errors",
    "explain_miss": "explain.explain",
    "load_model": "models.load",
    "wrap_model": "models.load",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Account",
    "Agent",
    "AlreadyPrefilledError",
    "AttentionInfluence",
    "CacheBufferError",
    "ContextOverflowError",
    "CorruptFileError",
    "Decision",
    "Engine",
    "ExperimentError",
    "Field",
    "FingerprintMismatchError",
    "FrequencyRegimeError",
    "InputError",
    "InvalidArgumentError",
    "InvalidEditError",
    "InvalidOptionsError",
    "InvalidRequestError",
    "InvalidValueError",
    "MissCause",
    "MissReport",
    "MissingDataError",
    "MissingExtraError",
    "Mode",
    "Model",
    "ModelError",
    "ModelQueue",
    "ModelUnavailableError",
    "NonFiniteLogitsError",
    "NotPrefilledError",
    "Notebook",
    "OutOfStepError",
    "ProgrammableKVError",
    "QueueFullError",
    "RandomOrder",
    "Reader",
    "Recency",
    "RecordError",
    "RequestFinding",
    "Rows",
    "SeamRepair",
    "Skill",
    "SkillStore",
    "Span",
    "StateError",
    "StorageError",
    "SuggestedReader",
    "Suggestions",
    "TemplateError",
    "TokenState",
    "TrainingError",
    "Turn",
    "UnknownFieldError",
    "UnknownPartError",
    "UnknownSkillError",
    "UnsupportedModelError",
    "UnverifiedError",
    "__version__",
    "explain_miss",
    "load_model",
    "wrap_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
