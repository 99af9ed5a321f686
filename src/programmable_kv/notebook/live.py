"""`Live`: the base of `Notebook` with its state and the properties that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from programmable_kv.account import Account
from programmable_kv.arguments import choice_of, require, require_fields
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Declared
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.ranking import AttentionInfluence, Ranking
from programmable_kv.errors import AlreadyPrefilledError, NotPrefilledError, OutOfStepError
from programmable_kv.models.load import Model
from programmable_kv.notebook.requests import checked_options, checked_tools
from programmable_kv.notebook.state import Part, State
from programmable_kv.prompt.fields import TEXT, Value, edited
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.prompt import Prompt
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.prompt.values import check_template
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE
from programmable_kv.skills.skill import Skill
from programmable_kv.states import TokenState


class Live:
    """A context and its cache: text and fields, and their keys and values once they are computed."""

    def __init__(
        self,
        model: Model,
        *,
        erratum_template: str = DEFAULT_TEMPLATE,
        ranking: Ranking | None = None,
        fold_system: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        visibility: str | Visibility = Visibility.CAUSAL,
    ) -> None:
        """
        Args:
            erratum_template: the line with which an edit states a new value; it has `{name}` and `{value}`.
            ranking: which later tokens a `selective` edit recomputes; by attention (`AttentionInfluence`) when None.
            fold_system: put a leading system message at the beginning of the first user turn if the chat template has
                no place for one (Gemma, Mistral). Other templates are not affected.
            tools: tools for the chat template, in the format of OpenAI's API.
            template_kwargs: other variables of the chat template, such as `enable_thinking` or `date_string`. A string
                given for `strftime_now` is returned to a template that asks for the current date.
            visibility: under `causal` every token reads all text before it. Under `design` a field is read only by the
                lines that mention it and by turns, and a skill reads only itself. Edits and splices are then exact and
                recompute only what read the change (`docs/by-design.md`). It changes what the model computes, and so
                what it decides.

        Raises:
            InvalidArgumentError: `model` is not a `Model`, or `visibility` is unknown.
            InvalidValueError: the erratum template lacks `{name}` or `{value}` or has several lines; or tools or
                variables are not plain data.
        """
        require(model, Model, "a notebook needs a Model from load_model or wrap_model")
        check_template(erratum_template)
        self.model = model
        self.erratum_template = erratum_template
        self.ranking = ranking or AttentionInfluence()
        self._lines_read_fields = False  # only the lab sets it: `lab/published.py`
        self.visibility = choice_of(Visibility, visibility, "visibility is")
        """what a token may read of the text before it"""
        self.prompt = Prompt(
            model.tokenizer,
            erratum_template,
            ChatTemplate(
                model.tokenizer,
                checked_tools(tools, model.tokenizer),
                checked_options(template_kwargs, model.tokenizer),
                fold_system=fold_system,
            ),
        )
        self._skills: dict[str, Skill] = {}
        self._declared = Declared()
        """the words declared for each field, and what may read each part"""
        self._state = State()
        self._buffer: KVBuffer | None = None
        self._stream_open = False
        self._thoughts: list[list[int]] = []
        self.last_account = Account()
        """the account of the latest operation"""

    @property
    def cache(self) -> KVBuffer:
        """The KV cache, a transformers `Cache`: `transformers_model.generate(ids, past_key_values=notebook.cache)`.

        The notebook does not know the tokens that transformers appends to it: wrap such calls in `mark` and `rollback`.

        Raises:
            NotPrefilledError: the context has not been computed yet.
        """
        if self._buffer is None:
            raise NotPrefilledError("the context has not been computed yet: call .prefill() first")
        return self._buffer

    @property
    def ids(self) -> list[int]:
        """The token ids in the cache, one for each slot."""
        return self._state.context.ids

    @property
    def rendered_text(self) -> str:
        """The text whose tokens are cached."""
        return self._state.context.text

    def rendered(self) -> Rendered:
        """The prompt as the model reads it at prefill, with the characters of every field.

        A notebook from `load` has no prompt: for it, this is the cached text.
        """
        return self._state.context.rendered if self.prompt.empty else self.prompt.rendered()

    @property
    def fields(self) -> dict[str, str]:
        """The current value of every field, as text."""
        if self._buffer is not None:
            return self._state.context.shown
        return {name: self.prompt.types.get(name, TEXT).shown(text) for name, text in self.prompt.fields.items()}

    def spans(self, name: str) -> list[Span]:
        """The slots of a field's value, one span for each place where it stands.

        Raises:
            UnknownFieldError: the context has no field of that name.
        """
        _ = self.cache
        require_fields([name], self._state.context.fields)
        return list(self._state.context.spans(name))

    @property
    def states(self) -> list[TokenState]:
        """The state of every cached token, in slot order."""
        _ = self.cache
        return self._state.token_states()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the context, in order."""
        _ = self.cache
        return self._state.parts()

    def part(self, name: str) -> Part:
        """The part of the context that is the skill of this name.

        Raises:
            UnknownPartError: the context has no skill of that name, or several: use `parts`.
        """
        span = self._state.skill_named(name)
        return next(part for part in self.parts if part.span == span)

    def __len__(self) -> int:
        return len(self._state.context)

    def _changed(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The given values that differ from the fields' current ones. Values of unknown fields count as different.

        Raises:
            InvalidValueError: a value is not of its field's type.
        """
        texts, _ = edited(values, self._state.context.types)
        current = self._state.context.values
        return {name: value for name, value in values.items() if current.get(name) != texts[name]}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Make several steps atomic: if the block raises, the notebook returns to its state before the block."""
        state, buffer = self._ready(), self.cache
        mark = buffer.mark()
        try:
            yield
        except BaseException:
            if buffer.holds(mark):  # otherwise the caller has already rolled back further
                buffer.rollback(mark)
                self._state = state
            raise
        if buffer.holds(mark):
            buffer.release(mark)

    def _recorded(self, account: Account) -> Account:
        self.last_account = account
        return account

    def _unchanged(self, account: Account, operation: str) -> Account:
        """The account of an operation that computes no token of this context."""
        return account.of(operation=operation, tokens_reused=len(self), exactness=self._state.weakest)

    def _ready(self) -> State:
        """The current state, checked to be one that an operation can start from.

        Raises:
            NotPrefilledError: the context has not been computed yet.
            OutOfStepError: a stream is open, or transformers wrote to the cache without the notebook.
        """
        buffer = self.cache
        if self._stream_open:
            raise OutOfStepError(
                "a stream from .generate() is still open and has its own tokens in the cache. Finish or close it first."
            )
        if buffer.length != len(self._state.context):
            raise OutOfStepError(
                f"the cache has {buffer.length} tokens, but this notebook knows of {len(self._state.context)}: transformers "
                "wrote to .cache directly. Roll back to a mark from before that."
            )
        if buffer.foreign_from is not None and buffer.foreign_from < buffer.length:
            raise OutOfStepError(
                f"transformers wrote to .cache directly, from slot {buffer.foreign_from} on, over tokens that this notebook "
                "knows of. Roll back to a mark from before that."
            )
        buffer.foreign_from = None  # what transformers wrote after the end is gone again
        return self._state

    def _require_not_prefilled(self) -> None:
        if self._buffer is not None:
            raise AlreadyPrefilledError("the context was already prefilled: use .add(role, content) to append to it")
