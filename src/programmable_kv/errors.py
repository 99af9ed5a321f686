"""The exceptions of this package. Each message says what was found, what was expected, and what to do.

A call that raises one of them leaves the state unchanged.

```
ProgrammableKVError
├── ModelError
│   ├── UnsupportedModelError     the model caches something this package cannot edit
│   ├── UnverifiedError           not proved exact on this model, so refused
│   ├── FrequencyRegimeError      new tokens would get different rotary frequencies from the cached ones
│   ├── NonFiniteLogitsError      the model computed NaN or infinity
│   └── ModelUnavailableError     the weights cannot be found or fetched
├── InputError
│   ├── InvalidArgumentError      an argument of the wrong type or out of range
│   ├── InvalidValueError         a field's name, a value or a text is not plain data
│   ├── InvalidEditError          an edit or a composition that is not possible in this context
│   ├── InvalidOptionsError       the options of a decision cannot be compared
│   ├── InvalidRequestError       a request, a log or a price table cannot be read
│   ├── UnknownFieldError         the context has no field of that name
│   ├── UnknownPartError          the context has no part, slot or skill of that name
│   └── TemplateError             the chat template rejects this conversation
├── StateError
│   ├── NotPrefilledError         the context has not been prefilled yet
│   ├── AlreadyPrefilledError     the context has been prefilled already
│   ├── OutOfStepError            the cache contains tokens that the notebook does not know
│   ├── QueueFullError            too many operations wait for this model
│   ├── ContextOverflowError      more positions are needed than the model has
│   └── CacheBufferError          slots, positions or marks do not fit the buffer
├── StorageError
│   ├── FingerprintMismatchError  saved by another model, tokenizer or dtype
│   ├── CorruptFileError          a file does not match its manifest
│   └── UnknownSkillError         the store has no skill of that name, or has several
├── ExperimentError
│   ├── TrainingError             training cannot start or continue
│   ├── RecordError               a result record is missing or does not fit the schema
│   └── MissingDataError          an experiment's data package is not installed
└── MissingExtraError             an optional dependency of this package is not installed
```
"""

from __future__ import annotations


class ProgrammableKVError(Exception):
    """Base of every error that this package raises on purpose. The call that raised it left the state unchanged."""


class ModelError(ProgrammableKVError):
    """The model cannot do what was asked of it."""


class UnsupportedModelError(ModelError):
    """The model caches something this package cannot edit (for example a recurrent state)."""


class UnverifiedError(ModelError):
    """The operation has not been proved exact for this model, so it is refused."""


class FrequencyRegimeError(ModelError):
    """The forward would use different rotary frequencies from the cached tokens (LongRoPE, dynamic NTK)."""


class NonFiniteLogitsError(ModelError):
    """The model computed NaN or infinity, in its logits or in its cached values."""


class ModelUnavailableError(ModelError):
    """A model's weights cannot be found or fetched: no network, wrong digest, full disk, unknown name."""


class InputError(ProgrammableKVError):
    """An argument, a text or a file that the caller passed in cannot be used."""


class InvalidArgumentError(InputError):
    """An argument has the wrong type or is out of range."""


class InvalidValueError(InputError):
    """A field's name, a value or a message is not plain data."""


class InvalidEditError(InputError):
    """The edit or the composition is not possible in this context."""


class InvalidOptionsError(InputError):
    """The options of a decision are missing, equal, or tokenise to nothing."""


class InvalidRequestError(InputError):
    """A client's request, a line of a log, or a price table cannot be read."""


class UnknownFieldError(InputError):
    """The context has no field of the given name, or a declared field never appears in the text."""


class UnknownPartError(InputError):
    """The context has no part, slot or spliced skill of the given name."""


class TemplateError(InputError):
    """The chat template rejects this conversation, or changes the text of its messages."""


class StateError(ProgrammableKVError):
    """The notebook or its cache is not in the state that the operation needs."""


class NotPrefilledError(StateError):
    """The context has not been prefilled yet: call `prefill` first."""


class AlreadyPrefilledError(StateError):
    """The context has been prefilled already: append to it with `add`."""


class OutOfStepError(StateError):
    """A stream is open, or the cache contains tokens that the notebook does not know."""


class QueueFullError(StateError):
    """Too many operations wait for a model: try again later."""


class ContextOverflowError(StateError):
    """The operation would need more positions than the model has."""


class CacheBufferError(StateError):
    """A buffer operation was given slots, positions or marks that do not fit the buffer."""


class StorageError(ProgrammableKVError):
    """A saved object cannot be written, read, found or trusted."""


class FingerprintMismatchError(StorageError):
    """A saved object belongs to another model, tokenizer or dtype."""


class CorruptFileError(StorageError):
    """A file does not match its manifest."""


class UnknownSkillError(StorageError):
    """The store has no skill of the given name, or has several."""


class ExperimentError(ProgrammableKVError):
    """An experiment, a bench or a training run cannot be carried out."""


class TrainingError(ExperimentError):
    """Training cannot start or continue in the given folder."""


class RecordError(ExperimentError):
    """A result record is missing, unreadable, or does not fit the schema."""


class MissingDataError(ExperimentError):
    """The package that contains an experiment's data is not installed."""


class MissingExtraError(ProgrammableKVError):
    """The operation needs an optional dependency that is not installed; the message names the extra."""
