"""A cached context: parts in, prefilled once, appended to, marked and taken back. `Notebook` adds edits and questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

from programmable_kv.account import Account, Meter
from programmable_kv.cache.buffer import KVBuffer, Mark
from programmable_kv.cache.span import Span
from programmable_kv.edits.ranking import AttentionInfluence, Ranking
from programmable_kv.edits.splicing import SKILL_MARK, SeamRepair, cut_at_skills, joined_values, splice
from programmable_kv.errors import InvalidEditError, NotPrefilledError, OutOfStepError, UnknownFieldError
from programmable_kv.ledger.context import Context, FieldState
from programmable_kv.models.load import Model
from programmable_kv.prompt.parts import Message, Rendered, Text, continuation, render_chat, unmark
from programmable_kv.prompt.units import Kind, TokenState, Unit, tokenised
from programmable_kv.prompt.values import check_name, check_no_markers, check_role, check_template, check_value
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE
from programmable_kv.skills.skill import Skill, skills_among


@dataclass(frozen=True, slots=True)
class NotebookMark:
    """A state of a notebook that can be returned to."""

    buffer: Mark
    context: Context
    messages: tuple[Message, ...]


class CachedContext:
    """Text and fields, computed once; the books (`Context`) and the cache (`KVBuffer`) kept in step."""

    def __init__(
        self, model: Model, *, erratum_template: str = DEFAULT_TEMPLATE, ranking: Ranking | None = None
    ) -> None:
        check_template(erratum_template)
        self.model = model
        self.erratum_template = erratum_template
        self.ranking = ranking or AttentionInfluence()
        self._values: dict[str, str] = {}
        self._skills: dict[str, Skill] = {}
        self._texts: list[Text] = []
        self._messages: list[Message] = []
        self._context = Context()
        self._buffer: KVBuffer | None = None
        self._thoughts: list[list[int]] = []
        self.last_account = Account()
        """what the latest operation cost"""

    # -- building ----------------------------------------------------------------------------------------------

    def message(self, role: str, content: str, /, **fields: str | Skill) -> Self:
        """Add a chat message. `{name}` in `content` is a field for every name given here or declared before.

        Where a `Skill` is given instead of a value, the compiled skill is spliced in at its placeholder.

        Raises:
            UnknownFieldError: a field given here has no placeholder in the content.
            InvalidValueError: a name or value is not plain data, or the content has special tokens.
            FingerprintMismatchError: another model compiled the skill.
            InvalidEditError: the notebook is made of raw text, a field was declared with another value, or a skill twice.
            NotPrefilledError: the context was computed already.
        """
        self._require_unfilled()
        if self._texts:
            raise InvalidEditError("this notebook is made of raw text; chat messages cannot be mixed in. Use .text().")
        check_role(role)
        check_no_markers(content, self.model.tokenizer, f"the {role} message")
        self._messages.append(Message(role, self._declared(content, fields)))
        return self

    def text(self, content: str, /, **fields: str | Skill) -> Self:
        """Add raw text, as the model will read it. Placeholders as in `message`."""
        self._require_unfilled()
        if self._messages:
            raise InvalidEditError(
                "this notebook is made of chat messages; raw text cannot be mixed in. Use .message()."
            )
        self._texts.append(self._declared(content, fields))
        return self

    def field(self, name: str, value: str) -> Self:
        """Add a field's value as raw text, right after what was added before."""
        return self.text("{" + name + "}", **{name: value})

    def skill(self, skill: Skill) -> Self:
        """Add a compiled skill as raw text, right after what was added before."""
        return self.text("{" + skill.name + "}", **{skill.name: skill})

    def _declared(self, content: str, given: Mapping[str, str | Skill]) -> Text:
        fields, skills = skills_among(given)
        for name, skill in skills.items():
            check_name(name)
            skill.check_fits(self.model)
            if name in self._values or content.count("{" + name + "}") > 1:
                raise InvalidEditError(f"{name} was declared before: a skill has one place, and a name of its own")
        own = {name: value for skill in (self._skills | skills).values() for name, value in skill.values.items()}
        for name, value in fields.items():
            check_name(name)
            if self._values.get(name, value) != value:
                raise InvalidEditError(f"field {name} was declared before as {self._values[name]!r}, now as {value!r}")
        self._check_values(self.fields | own | fields)
        fields |= dict.fromkeys(skills, SKILL_MARK)
        known = {**self._values, **fields}
        text = Text(content, tuple(name for name in known if name in fields or "{" + name + "}" in content))
        text.check()
        self._values = known
        self._skills.update(skills)
        return text

    def _check_values(self, values: Mapping[str, str]) -> None:
        """Every value is data, as far as all of these fields and this notebook's wording of an erratum are concerned."""
        for name, value in values.items():
            check_value(name, value, self.model.tokenizer, self.erratum_template, values)

    def prefill(self, *, repair: SeamRepair | None = None) -> Account:
        """Compute the whole context once; skills in it are spliced, and `repair` says which of their tokens are computed.

        Raises:
            NotPrefilledError: there is nothing to prefill, or it was prefilled already.
            UnverifiedError: there is a skill, and this model's keys cannot be moved.
            ContextOverflowError: the context is longer than the model's positions.
            TemplateError: the chat template changes what the messages say.
        """
        self._require_unfilled()
        if not self._texts and not self._messages:
            raise NotPrefilledError("the notebook is empty: add .message(...) or .text(...) before .prefill()")
        engine = self.model.engine
        pieces = self._pieces()
        values = self.fields
        for skill in self._skills.values():
            values = joined_values(values, skill)
        context = Context([], {name: FieldState(value, value) for name, value in values.items()})
        length = sum(len(piece) for piece in pieces)
        if not length:
            raise NotPrefilledError("the notebook's text is empty: there is nothing to compute")
        engine.check_length(length)
        if self._skills:
            engine.verify()
        repair = repair or SeamRepair()
        buffer = engine.new_buffer(length + 128)
        with engine.meter.measure() as reading:
            for piece in pieces:
                if isinstance(piece, Skill):
                    splice(engine, buffer, context, piece, Span(len(context), len(context)), repair)
                else:
                    engine.append(buffer, piece.ids, logits=0)
                    context.append(piece)
        self._context, self._buffer = context, buffer
        self.last_account = reading.account
        return reading.account

    def _pieces(self) -> list[Unit | Skill]:
        """The text between skills, tokenised, and the skills, in order. Raw text begins with the token that begins every text,
        where the tokenizer has one, also if a skill comes first."""
        tokenizer, cut = self.model.tokenizer, cut_at_skills(self.rendered(), self._skills)
        if not self._messages and cut and isinstance(cut[0], Skill):
            cut = [Rendered(""), *cut]
        pieces = [
            piece
            if isinstance(piece, Skill)
            else tokenised(tokenizer, piece, Kind.PREFILL, special=not self._messages and number == 0)
            for number, piece in enumerate(cut)
        ]
        return [piece for piece in pieces if len(piece)]

    def rendered(self) -> Rendered:
        """The parts as written, as the model will read them at prefill, with the characters of every field."""
        if self._messages:
            return render_chat(self.model.tokenizer, self._messages, self._values)
        return unmark("".join(text.marked(self._values) for text in self._texts))

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def cache(self) -> KVBuffer:
        """The cache itself, a transformers `Cache`: `transformers_model.generate(ids, past_key_values=notebook.cache)`.

        What transformers appends to it by itself, the notebook does not know of: wrap such calls in `mark` and `rollback`.
        """
        return self._filled()

    @property
    def ids(self) -> list[int]:
        """The token ids in the cache, one for each slot."""
        return self._context.ids

    @property
    def rendered_text(self) -> str:
        """The text whose tokens are cached."""
        return self._context.text

    @property
    def fields(self) -> dict[str, str]:
        """Every field's current value."""
        if self._buffer is None:
            return {name: value for name, value in self._values.items() if name not in self._skills}
        return {name: state.current for name, state in self._context.fields.items()}

    @property
    def written_values(self) -> dict[str, str]:
        """What stands in every placeholder, a skill's mark included. An erratum may say otherwise of a field."""
        return self._values | {name: state.written for name, state in self._context.fields.items()}

    def spans(self, name: str) -> list[Span]:
        """The slots of every place of a field.

        Raises:
            UnknownFieldError: there is no such field.
        """
        self._filled()
        self._require_known([name])
        return self._context.spans(name)

    @property
    def states(self) -> list[TokenState]:
        """What every cached token is worth."""
        return self._context.states(self._filled().relocated.tolist())

    def __len__(self) -> int:
        return len(self._context)

    def add(self, role: str, content: str, /) -> Account:
        """Append a turn to the live context: what the user said, a tool's result, the assistant's own answer.

        For a raw-text notebook the role is not rendered: the content is appended as it is.

        Raises:
            InvalidValueError: the content has special tokens, or the role is no word.
            TemplateError: the chat template cannot continue this conversation with that role.
            ContextOverflowError: it does not fit.
        """
        check_role(role)
        check_no_markers(content, self.model.tokenizer, f"the {role} turn")
        return self._append_turn(role, content)

    def _append_turn(self, role: str, content: str) -> Account:
        buffer = self._filled()
        reused = len(self._context)
        with self._transaction() as meter, meter.measure() as reading:
            if self._messages:
                message = Message(role, Text(content))
                rendered = self._continuation([message])
                self._messages.append(message)
            else:
                rendered = Rendered(content)
            unit = tokenised(self.model.tokenizer, rendered, Kind.TURN)
            if len(unit):
                self.model.engine.append(buffer, unit.ids, logits=0)
                context = self._context.copy()
                context.append(unit)
                self._context = context
        return self._account(reading.account, reused)

    def _continuation(self, more: Sequence[Message], *, prompt_for_answer: bool = False) -> Rendered:
        written = self.written_values
        return continuation(self.model.tokenizer, self._messages, more, written, prompt_for_answer=prompt_for_answer)

    # -- state -------------------------------------------------------------------------------------------------

    def mark(self) -> NotebookMark:
        """Remember this state. Costs nothing until something is overwritten."""
        return NotebookMark(self._filled().mark(), self._context, tuple(self._messages))

    def rollback(self, mark: NotebookMark) -> Account:
        """Return to a mark, at the cost of what was overwritten since; it and later marks are used up.

        Raises:
            CacheBufferError: the mark is used up, or another notebook's.
        """
        with self.model.engine.meter.measure() as reading:
            self._filled().rollback(mark.buffer)
        self._context, self._messages = mark.context, list(mark.messages)
        return self._account(reading.account, len(self._context))

    def release(self, mark: NotebookMark) -> None:
        """Keep what happened since a mark; it and later marks are used up.

        Raises:
            OutOfStepError: a stream is open, which has a mark of its own.
        """
        self._require_in_step().release(mark.buffer)

    def fork(self) -> Self:
        """An independent notebook in the same state. Copies the cache; its `last_account` says what that cost."""
        self._require_in_step()
        other = type(self)(self.model, erratum_template=self.erratum_template, ranking=self.ranking)
        other._values, other._texts, other._messages = dict(self._values), list(self._texts), list(self._messages)
        other._skills = dict(self._skills)
        other._context = self._context.copy()
        with self.model.engine.meter.measure() as reading:
            other._buffer = self._filled().fork()
        other._account(reading.account, len(self._context))
        return other

    def _repr_html_(self) -> str:
        from programmable_kv.notebook.html import tokens_html

        return tokens_html(self)

    @contextmanager
    def _transaction(self) -> Iterator[Meter]:
        """If the block raises, the notebook is put back as it was before it."""
        buffer = self._require_in_step()
        mark = buffer.mark()
        context, messages = self._context, list(self._messages)
        try:
            yield self.model.engine.meter
        except BaseException:
            if buffer.holds(mark):  # or else the user has rolled back further already
                buffer.rollback(mark)
                self._context, self._messages = context, messages
            raise
        if buffer.holds(mark):
            buffer.release(mark)

    def _account(self, account: Account, reused: int, note: str = "") -> Account:
        """`reused`: how many cached tokens were neither computed nor moved."""
        self.last_account = replace(account, tokens_reused=reused, note=note)
        return self.last_account

    def _require_in_step(self) -> KVBuffer:
        buffer = self._filled()
        if buffer.length != len(self._context):
            raise OutOfStepError(
                f"the cache holds {buffer.length} tokens and this notebook knows of {len(self._context)}: a stream from "
                ".generate() is still open, or transformers appended to .cache by itself. Finish or close the stream; or "
                "roll back to a mark from before."
            )
        return buffer

    def _filled(self) -> KVBuffer:
        if self._buffer is None:
            raise NotPrefilledError("the context has not been computed yet: call .prefill() first")
        return self._buffer

    def _require_unfilled(self) -> None:
        if self._buffer is not None:
            raise NotPrefilledError("the context was prefilled already: use .add(role, content) to append to it")

    def _require_known(self, names: Mapping[str, str] | Sequence[str]) -> None:
        for name in names:
            if name not in self._context.fields:
                known = ", ".join(self._context.fields) or "none"
                raise UnknownFieldError(f"there is no field {name!r}; the context's fields are: {known}")
