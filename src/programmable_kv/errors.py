"""One family of typed errors. Each message says what was found, what was expected, and what to do.

After any of them the state is unchanged.

```
ProgrammableKVError
├── ModelError
│   ├── UnsupportedModelError     the model caches something this package cannot edit
│   ├── UnverifiedError           not proved exact on this model, so refused
│   ├── FrequencyRegimeError      the model would compute with other frequencies than the cached tokens
│   ├── NonFiniteLogitsError      the model computed NaN or infinity
│   └── ModelUnavailableError     the weights could not be had
├── InputError
│   ├── InvalidArgumentError      an argument of the wrong type or out of range
│   ├── InvalidValueError         a field's name, a value or a text is not plain data
│   ├── InvalidEditError          an edit or a composition that cannot be made here
│   ├── InvalidOptionsError       the options of a decision cannot be compared
│   ├── UnknownFieldError         no field of that name
│   ├── UnknownPartError          no part, slot or skill of that name in the context
│   └── TemplateError             the chat template does not take this conversation
├── StateError
│   ├── NotPrefilledError         the context has not been computed yet
│   ├── AlreadyPrefilledError     the context has been computed already
│   ├── OutOfStepError            the cache holds tokens that the notebook does not know of
│   ├── QueueFullError            too many operations wait for this model
│   ├── ContextOverflowError      more positions are needed than the model has
│   └── CacheBufferError          slots, positions or marks that do not fit the buffer
├── StorageError
│   ├── FingerprintMismatchError  saved by another model, tokenizer or dtype
│   ├── CorruptFileError          a file is not what its manifest says
│   └── UnknownSkillError         the store has no such skill, or several
├── ExperimentError
│   ├── TrainingError             training cannot start or go on
│   ├── RecordError               a result record is missing or does not fit the schema
│   └── MissingDataError          an experiment's data package is not installed
└── MissingExtraError             an optional dependency of this package is not installed
```
"""

from __future__ import annotations


class ProgrammableKVError(Exception):
    """Base of every error this package raises on purpose. The state is unchanged by the call that raised it."""


class ModelError(ProgrammableKVError):
    """The model cannot do what was asked of it."""


class UnsupportedModelError(ModelError):
    """The model caches something this package cannot edit (for example a recurrent state)."""


class UnverifiedError(ModelError):
    """The operation has not been proved exact for this model, so it is refused."""


class FrequencyRegimeError(ModelError):
    """The forward would use other rotary frequencies than the tokens in the cache (LongRoPE, dynamic NTK)."""


class NonFiniteLogitsError(ModelError):
    """The model computed NaN or infinity, in logits or in what it caches."""


class ModelUnavailableError(ModelError):
    """A model's weights could not be had: no network, wrong digest, full disk, no such name."""


class InputError(ProgrammableKVError):
    """What was passed in cannot be used."""


class InvalidArgumentError(InputError):
    """An argument has the wrong type or is out of range."""


class InvalidValueError(InputError):
    """A field's name, a value or a message is not plain data."""


class InvalidEditError(InputError):
    """An edit or a composition that cannot be made in this context."""


class InvalidOptionsError(InputError):
    """The options of a decision are empty, equal, or tokenise to nothing."""


class UnknownFieldError(InputError):
    """A field was named that the context does not have, or a declared field never appears in the text."""


class UnknownPartError(InputError):
    """A part, a slot or a spliced skill was named that the context does not have."""


class TemplateError(InputError):
    """The chat template does not take this conversation, or changes what its messages say."""


class StateError(ProgrammableKVError):
    """The notebook or its cache is not in the state that the operation needs."""


class NotPrefilledError(StateError):
    """The context has not been computed yet: call `prefill` first."""


class AlreadyPrefilledError(StateError):
    """The context has been computed already: append to it with `add`."""


class OutOfStepError(StateError):
    """A stream is open, or the cache holds tokens that the notebook does not know of."""


class QueueFullError(StateError):
    """Too many operations wait for a model: try again later."""


class ContextOverflowError(StateError):
    """The operation would need more positions than the model has."""


class CacheBufferError(StateError):
    """A buffer operation was given slots, positions or marks that do not fit the buffer."""


class StorageError(ProgrammableKVError):
    """Something saved cannot be written, found or trusted."""


class FingerprintMismatchError(StorageError):
    """A saved object belongs to another model, tokenizer or dtype."""


class CorruptFileError(StorageError):
    """A file is not what its manifest says it is."""


class UnknownSkillError(StorageError):
    """A skill was named that the store does not have, or has several times."""


class ExperimentError(ProgrammableKVError):
    """An experiment, a bench or a training run cannot be carried out."""


class TrainingError(ExperimentError):
    """Training cannot start or go on in the folder given."""


class RecordError(ExperimentError):
    """A result record is missing, unreadable, or does not fit the schema."""


class MissingDataError(ExperimentError):
    """An experiment's data comes from a package that is not installed."""


class MissingExtraError(ProgrammableKVError):
    """The operation needs an optional dependency that is not installed; the message names the extra."""
