"""One family of typed errors. Each message says what was found, what was expected, and what to do."""

from __future__ import annotations


class ProgrammableKVError(Exception):
    """Base of every error this package raises on purpose. State is as it was before the call."""


class UnsupportedModelError(ProgrammableKVError):
    """The model caches something this package cannot edit (for example a recurrent state)."""


class UnverifiedError(ProgrammableKVError):
    """Relocation has not been proved exact for this model, so it is refused."""


class UnknownSkillError(ProgrammableKVError):
    """A skill was named that the store does not have, or has several times."""


class UnknownFieldError(ProgrammableKVError):
    """A field was named that the context does not have, or a declared field never appears in the text."""


class InvalidValueError(ProgrammableKVError):
    """A field's name, value or a message could not be written as plain data."""


class ContextOverflowError(ProgrammableKVError):
    """The operation would need more positions than the model has."""


class NotPrefilledError(ProgrammableKVError):
    """The context has not been prefilled yet (or, for parts, has been prefilled already)."""


class TemplateError(ProgrammableKVError):
    """The chat template does not leave message contents and earlier turns as they were."""


class OutOfStepError(ProgrammableKVError):
    """The cache holds tokens that the notebook does not know of, so its books cannot be trusted."""


class InvalidOptionsError(ProgrammableKVError):
    """The options of a decision are empty, equal, or tokenise to nothing."""


class InvalidEditError(ProgrammableKVError):
    """An edit was asked for in a mode, or with arguments, that do not exist."""


class CacheBufferError(ProgrammableKVError):
    """A buffer operation was given slots, positions or marks that do not fit the buffer."""


class NonFiniteLogitsError(ProgrammableKVError):
    """The model computed NaN or infinity, in logits or in what it caches."""


class FingerprintMismatchError(ProgrammableKVError):
    """A saved object belongs to another model, tokenizer or dtype."""


class CorruptFileError(ProgrammableKVError):
    """A file is not what its manifest says it is."""


class ModelUnavailableError(ProgrammableKVError):
    """A model's weights could not be had: no network, wrong digest, full disk, no such name."""


class TrainingError(ProgrammableKVError):
    """Training cannot start or go on in the folder given."""


class RecordError(ProgrammableKVError):
    """A result record is missing, unreadable, or does not fit the schema."""


class MissingDataError(ProgrammableKVError):
    """An experiment's data comes from a package that is not installed."""
