"""`Notebook`: a context of text and fields whose KV cache is edited instead of prefilled again.

notebook = Notebook(load_model())
notebook.message("system", "... order_status: {order_status} ...", order_status="shipped")
notebook.message("user", "Can I still cancel?")
notebook.prefill()
notebook.decide(options=["cancel", "deny"])
notebook.edit(order_status="pending")
notebook.decide(options=["cancel", "deny"])
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from programmable_kv.account import Account
from programmable_kv.arguments import require
from programmable_kv.cache.span import Span
from programmable_kv.design.closure import readers_by_design
from programmable_kv.edits.apply import Applied, apply
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.plan import Plan
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.engine import Progress
from programmable_kv.errors import NotPrefilledError
from programmable_kv.models.load import Model
from programmable_kv.notebook import asking, prefilling, saving, streaming
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.plans import Plans
from programmable_kv.notebook.requests import message_of
from programmable_kv.notebook.sampling import Sampling, Watch
from programmable_kv.notebook.state import NotebookMark, Part, State
from programmable_kv.notebook.suggesting import SHARE, Suggestions, suggest
from programmable_kv.notebook.writing import Written
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.fields import Value
from programmable_kv.prompt.parts import Message, Rendered, Text
from programmable_kv.prompt.readers import Reader, Turns, declared_words, parse_turns, readers_of
from programmable_kv.prompt.tokens import as_text
from programmable_kv.prompt.turns import turn_slots
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.skills.skill import Skill
from programmable_kv.storage.files import Blobs


class Notebook(Written):
    """A context of text and fields that is prefilled once, then edited, queried, extended and composed in its KV cache.

    Build it from chat messages (`message`) or from raw text (`text`, `field`), not from both. Call `prefill` once. Then
    call `edit`, `decide`, `generate`, `add`, `splice`, `cut` and the other operations in any order. Each operation
    returns or records an `Account` of what it cost (`last_account` has the latest), and `plan` shows what an operation
    would do. An operation that raises leaves the notebook unchanged.
    """

    def prefill(self, *, repair: SeamRepair | None = None, progress: Progress | None = None) -> Account:
        """Prefill the whole context. Skills in it are spliced in instead of computed.

        Args:
            repair: which tokens of each skill to recompute in this context; `SeamRepair()` when None.
            progress: called with (tokens done, tokens in all) after each chunk of a long text. If it raises, or on
                Ctrl-C, the notebook is unchanged.

        Raises:
            NotPrefilledError: the notebook is empty.
            AlreadyPrefilledError: the notebook was prefilled before.
            UnverifiedError: the context has a skill and this model's keys cannot be relocated; or the notebook has
                visibility="design" and this model cannot recompute tokens in the middle of a context.
            ContextOverflowError: the context needs more positions than the model has.
            TemplateError: the chat template changes what the messages say.
            InvalidEditError: `repair` recomputes tokens under visibility="design", where skills have no seam; or an
                empty field has no text on either side.
        """
        self._require_not_prefilled()
        if self.prompt.empty:
            raise NotPrefilledError("the notebook is empty: add .message(...) or .text(...) before .prefill()")
        self._state, self._buffer, account = prefilling.prefill(self, repair, progress)
        return self._recorded(account)

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plans:
        """Plans of operations, which change nothing: `print(notebook.plan.edit(order_status="shipped"))`."""
        return Plans(self)

    def readers(self, name: str, *, turns: str = "open") -> tuple[Reader, ...]:
        """List the readers of a field: each piece of text that `edit(..., mode="readers")` recomputes, and why.

        The field's own tokens are recomputed as well. Under `visibility="design"` the list has everything that an edit
        recomputes: the text that read the field, directly or through other text.

        Args:
            turns: as in `edit`.

        Raises:
            UnknownFieldError: the context has no field of that name.
            InvalidArgumentError: `turns` is not open, keep or all.
        """
        self.spans(name)
        wanted = parse_turns(turns)
        if (design := self.plan._design()) is not None:
            kept = design.kept(design.context, wanted)
            return readers_by_design(design.context, self._declared, name, wanted, kept)
        return self._readers_in(self._state.context, name, wanted)

    def suggest_readers(
        self,
        name: str,
        value: Value,
        /,
        *,
        prompt: str | None = None,
        options: Sequence[str] = (),
        share: float = SHARE,
        turns: str = "open",
    ) -> Suggestions:
        """Find the lines on which the model uses a field: their keys and values change when the field's value changes.

        Print the result. It marks a line that uses the field but is not one of its readers as MISSED, and its `words`
        are what to pass to `mentions`. The notebook is unchanged. The search copies the cache and recomputes everything
        after the field once; a context that is not exact is recomputed first. With `options`, it also makes the
        decision before the edit, after it by full prefill, by readers and by readers with all suggested lines, and once
        for each missed line: how much of the distance to full prefill that line closes alone.

        Args:
            value: another value of the field. The model may use other values on other lines.
            prompt, options: a decision that depends on the field, as in `decide`.
            share: how far a line has to move to be suggested, as a share (above 0, at most 1) of the line that moves
                farthest.
            turns: as in `edit`. Turns that an edit recomputes in any case are not listed.

        Raises:
            InvalidArgumentError: `share` is out of its range, or `turns` is not open, keep or all.
            InvalidEditError: the notebook has visibility="design", where lines that are not declared have not read the
                field.
            UnknownFieldError, InvalidValueError, ContextOverflowError, UnverifiedError: as in `edit` with mode
                `readers`.
            InvalidOptionsError: the options cannot be compared.
        """
        return suggest(self, name, value, prompt, options, share, turns)

    def _readers_in(self, context: Context, name: str, turns: Turns, words: Sequence[str] = ()) -> tuple[Reader, ...]:
        """The readers of a field. They may mention its name, the declared words, or one of `words`."""
        slots = turn_slots(context, self._state.conversation, name)
        known = [word for each in (name, *words) for word in declared_words(self._declared.words, each)]
        return readers_of(context, name, (*known, *words), turns, slots)

    # -- operations --------------------------------------------------------------------------------------------

    def edit(
        self,
        changes: Mapping[str, Value] | None = None,
        /,
        *,
        mode: str | Mode | None = None,
        k: int = 32,
        turns: str = "open",
        **fields: Value,
    ) -> Account:
        """Give fields new values, as in `edit(order_status="pending")`.

        Pass a mapping for names that are not Python identifiers or that equal an option of this method. A field keeps
        its type: a value of another type is refused.

        Args:
            mode: one of `Mode`. None means `readers` if `mentions` was called for every one of these fields, otherwise
                `field_erratum`; but `suffix` where that computes no more tokens. Under `visibility="design"` None means
                `readers`, and only `readers`, `suffix` and `full` are allowed: every edit is exact.
            k: for `selective`, how many later tokens to recompute besides the field's own.
            turns: for `readers`, which turns to recompute: `open` (those since the last answer), `keep` (none) or
                `all`.

        Raises:
            InvalidArgumentError: `k` is not a whole number, or `turns` is not open, keep or all.
            UnknownFieldError: the context has no field of that name.
            InvalidValueError: a value is not of its field's type, or is not plain data.
            InvalidEditError: no field is named, `mode` is unknown or not allowed here, or `selective` has `k` below 1.
            TemplateError: the chat template takes no erratum at this point.
            ContextOverflowError: the new value or the erratum does not fit the model's positions.
            UnverifiedError: the value's token length changes and this model's keys cannot be relocated; or this model
                cannot recompute tokens in the middle of a context.
        """
        return self._carry_out(self.plan.edit(changes, mode=mode, k=k, turns=turns, **fields))

    def rebase(self, *, limit: int | None = None) -> Account:
        """Fold errata back: write their values into the fields' places, drop the errata, and recompute from there.

        Args:
            limit: the most tokens to compute. As many fields are folded back as this allows, starting with the last
                one.

        Raises:
            InvalidArgumentError: `limit` is not a whole number of at least 0.
            ContextOverflowError: the new text does not fit the model's positions.
        """
        return self._carry_out(self.plan.rebase(limit=limit))

    def splice(self, skill: Skill, /, *, at: int | Part | None = None, repair: SeamRepair | None = None) -> Account:
        """Insert a compiled skill into the live context. What follows it is relocated.

        Args:
            at: the slot (or the part) before which the skill goes; the context's end when None.
            repair: which of the skill's tokens to recompute in this context; `SeamRepair()` when None.

        Raises:
            InvalidArgumentError: `skill` is not a `Skill`, `at` is not a slot or a part, or `repair` is not a
                `SeamRepair`.
            UnverifiedError: this model's keys cannot be relocated.
            FingerprintMismatchError: another model compiled the skill.
            InvalidValueError: a field's value here states something about a field of the skill, or the other way round.
            ContextOverflowError: the skill does not fit the model's positions.
            UnknownPartError: the context has no such slot or part.
            InvalidEditError: the text cannot be split at `at`, a field of the skill has another value here, the skill
                was compiled with visibility="design" and this notebook is causal, or `repair` recomputes tokens under
                visibility="design".
        """
        return self._carry_out(self.plan.splice(skill, at=at, repair=repair))

    def cut(self, what: str | Part | Span, /) -> Account:
        """Remove a part: a skill by its name, one of `parts`, or a span of slots. What follows is relocated.

        Raises:
            InvalidArgumentError: `what` is not a name, a part or a span.
            UnverifiedError: this model's keys cannot be relocated.
            UnknownPartError: the context has no such part.
            InvalidEditError: the text cannot be split at an end of the span.
        """
        return self._carry_out(self.plan.cut(what))

    def move(self, what: str | Part | Span, /, *, to: int | Part | None = None) -> Account:
        """Move a part before the slot (or part) `to`, or to the context's end when `to` is None.

        Only the part and what it passes are touched. Moving a part to where it already stands costs nothing.

        Raises:
            InvalidArgumentError: `what` is not a name, a part or a span, or `to` is not a slot or a part.
            UnverifiedError: this model's keys cannot be relocated.
            UnknownPartError: the context has no such slot or part.
            InvalidEditError: `to` lies inside the part, or the text cannot be split at `to` or at an end of the part.
        """
        return self._carry_out(self.plan.move(what, to=to))

    def replace(self, what: str | Part | Span, skill: Skill, /, *, repair: SeamRepair | None = None) -> Account:
        """Put a skill in the place of a part. Raises the errors of `cut` and `splice`."""
        return self._carry_out(self.plan.replace(what, skill, repair=repair))

    def recompute(self, start: int | Part | None = None) -> Account:
        """Recompute everything from a slot (or part) on, or from the first inexact token when `start` is None.

        Recomputing from the first inexact token makes the whole context exact for its current text. (A value that only
        an erratum states is still stated by the erratum: `rebase` writes it into its place.) Under
        `visibility="design"`, skills that are exact are not recomputed.

        Raises:
            InvalidArgumentError: `start` is not a slot or a part.
            UnknownPartError: the context has no such slot or part.
        """
        return self._carry_out(self.plan.recompute(start))

    def add(
        self,
        role: str,
        content: str | Sequence[Any] | None = None,
        /,
        *,
        tool_calls: Sequence[Mapping[str, Any]] | None = None,
        tool_call_id: str | None = None,
        name: str | None = None,
    ) -> Account:
        """Append a turn to the live context: a user's message, a tool's result, or an answer of the assistant.

        A raw-text notebook does not render the role: it appends the content unchanged.

        Args:
            content: text, a list of text parts, or None for an assistant that only calls tools.
            tool_calls, tool_call_id, name: as chat clients send them, for the chat template.

        Raises:
            InvalidValueError: the role is not one word, the content is not text, a tool call is malformed, or a special
                token in the turn cannot be written as plain text.
            TemplateError: the chat template cannot continue this conversation with that role, or drops what the turn
                says.
            ContextOverflowError: the turn does not fit the model's positions.
        """
        known = {"tool_calls": tool_calls, "tool_call_id": tool_call_id, "name": name}
        message = message_of({"role": role, "content": content, **known}, self.model.tokenizer)
        return self._append_turn(role, message.content.template, message.extra)

    def _append_turn(self, role: str, content: str, extra: Mapping[str, Any] | None = None) -> Account:
        state = self._ready()
        content = as_text(content, self.model.tokenizer, f"the {role} turn")
        text, conversation, why = content, None, ""
        if state.conversation is not None:
            continuation = state.conversation.continued([Message(role, Text(content), extra or {})])
            text, conversation, why = continuation.added, continuation.conversation, continuation.why
        unit = tokenised(self.model.tokenizer, Rendered(text), Kind.TURN)
        return self._carry_out(self.plan.append(unit).because(why), conversation)

    def _carry_out(self, plan: Plan, conversation: Conversation | None = None) -> Account:
        return self._recorded(self._applied(plan, conversation).account)

    def _applied(
        self, plan: Plan, conversation: Conversation | None = None, *, followed_by: Sequence[int] = (), logits: int = 0
    ) -> Applied:
        """Carry out a plan made for the current state. `followed_by` goes into the buffer only, not into the state."""
        with self._transaction():  # an interrupt between the cache's change and the state's undoes both
            state = self._state
            applied = apply(plan, self.model.engine, self.cache, state.ledger, followed_by=followed_by, logits=logits)
            self._state = State(plan.after, applied.ledger, conversation or state.conversation)
        return applied

    # -- asking ------------------------------------------------------------------------------------------------

    def decide(
        self,
        prompt: str | None = None,
        options: Sequence[str] = (),
        *,
        edits: Mapping[str, Value] | None = None,
        mode: str | Mode | None = None,
        k: int = 32,
        turns: str = "open",
        skill: Skill | None = None,
        repair: SeamRepair | None = None,
        think: bool = False,
        keep: bool = False,
    ) -> Decision:
        """Choose the option that the model is likeliest to answer.

        The prompt and the answer are removed from the context again; an edit or a splice made in the same call stays.

        Args:
            prompt: asked as a user message (or raw text). None asks for the answer to what the context ends with. If
                the chat template opens a thought for the answer, it is closed first: options are answers, not thoughts.
            options: at least two strings, compared by the log-probability of the whole string.
            edits, mode, k, turns: an edit to make first, in the same forward as the prompt: the cheapest way to do
                both.
            skill, repair: a skill to splice in first, at the context's end; its seam is recomputed in the same forward.
            think: let the model restate the field in one line before it decides. A prompt gets an instruction to do so;
                without a prompt, the context should end with such a request.
            keep: make the prompt and the answer turns of the context. The prompt is not computed again for that.

        Raises:
            InvalidOptionsError: the options cannot be compared.
            InvalidEditError: an edit and a splice were given at once, a repair without a skill, or nothing to answer.
            UnknownFieldError, UnverifiedError, FingerprintMismatchError, ContextOverflowError: as in `edit` and
                `splice`.
            InvalidValueError: a special token in the prompt, or in an option with `keep`, cannot be written as plain
                text; or as in `edit` and `splice`.
            TemplateError: the chat template does not take the prompt, the erratum or, with `keep`, the answer.
        """
        question = asking.Question(prompt, options, think, keep)
        change = asking.Change(edits, mode, k, skill, repair, turns)
        return asking.decide(self, question, change)

    def generate(
        self,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int | str, float] | None = None,
        stop: Sequence[str] = (),
        max_seconds: float | None = None,
        keep: bool = False,
        watch: Watch | None = None,
    ) -> Iterator[str]:
        """Stream an answer as pieces of text. Decoding is greedy at temperature 0.

        With `keep`, the prompt and the answer become turns of the context. Otherwise they are removed again when the
        stream ends or is closed. Until then, operations that need or change the cache raise OutOfStepError, except
        `mark` and `rollback`. Afterwards `last_account` has the cost; its `why` says what ended the answer if the model
        did not.

        Args:
            prompt: as in `decide`.
            max_new_tokens: the most tokens that the answer may have.
            temperature, top_k, top_p, min_p: as in transformers. The last three have an effect only above temperature
                0.
            seed: of the random draws above temperature 0.
            repetition_penalty: as in transformers. It counts every token of the context, the prompt and the answer so
                far.
            logit_bias: what to add to logits, by token id or by text. The bias of a text of several tokens applies to
                its last token, where the tokens before it were just generated.
            stop: strings that end the answer. It ends before the first one that is complete. Text that may be the
                beginning of a stop string is held back until that is known.
            max_seconds: end the answer with the first token that is drawn after this time.
            watch: called with each token of the answer when it is drawn, and with the model's log-probabilities for it
                [V], before temperature, penalties and biases. It is not called with the token that ends the answer.

        Raises:
            OutOfStepError: another stream is open, the notebook changed before this stream began, or it was rolled back
                while the stream was open.
            InvalidValueError: a special token in the prompt cannot be written as plain text.
            InvalidArgumentError: a parameter is of the wrong type or out of its range.
            InvalidEditError: the context and the prompt are empty.
            TemplateError: the chat template does not take the prompt or, with `keep`, the answer.
            ContextOverflowError: the prompt or the answer does not fit. The stream may have yielded some text by then;
                the context is unchanged.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, logit_bias=logit_bias, stop=stop, max_seconds=max_seconds,
        )  # fmt: skip
        return streaming.stream(self, prompt, sampling, keep=keep, watch=watch)

    # -- state -------------------------------------------------------------------------------------------------

    def mark(self) -> NotebookMark:
        """Remember the current state, to return to it with `rollback`. Costs nothing until something is overwritten."""
        return NotebookMark(self.cache.mark(), self._state)

    def rollback(self, mark: NotebookMark) -> Account:
        """Return to a mark, at the cost of what was overwritten since. The mark and all later ones are used up.

        Raises:
            InvalidArgumentError: `mark` is not what `Notebook.mark` returned.
            CacheBufferError: the mark is used up, or belongs to another notebook.
        """
        require(mark, NotebookMark, "mark must come from Notebook.mark()")
        with self.model.engine.meter.measure() as reading:
            self.cache.rollback(mark.buffer)
        self._state = self._declared_in(mark.state)
        return self._recorded(self._unchanged(reading.account, "rollback"))

    def release(self, mark: NotebookMark) -> None:
        """Keep what happened since a mark. The mark and all later ones are used up.

        Raises:
            InvalidArgumentError: `mark` is not what `Notebook.mark` returned.
            CacheBufferError: the mark is used up, or belongs to another notebook.
            OutOfStepError: a stream is open, which has a mark of its own.
        """
        require(mark, NotebookMark, "mark must come from Notebook.mark()")
        self._ready()
        self.cache.release(mark.buffer)

    def fork(self) -> Self:
        """Copy the notebook and its cache. The copy is independent, and its `last_account` has the cost of copying."""
        state = self._ready()
        other = type(self)(
            self.model, erratum_template=self.erratum_template, ranking=self.ranking, visibility=self.visibility
        )
        other.prompt, other._skills, other._state = self.prompt, self._skills, state
        other._declared, other._lines_read_fields = self._declared, self._lines_read_fields
        with self.model.engine.meter.measure() as reading:
            other._buffer = self.cache.fork()
        other._recorded(other._unchanged(reading.account, "fork"))
        return other

    def save(self, where: str | Path | Blobs) -> Path | str:
        """Write the notebook (text, fields, keys, values) to a folder, any fsspec URL or your own `Blobs`, atomically.

        Returns the path or URL it was written to.

        Raises:
            NotPrefilledError: the notebook has no cache yet.
            CorruptFileError: the folder has something other than a saved notebook.
            StorageError: the notebook cannot be written. What was saved there before is unchanged.
        """
        meter = self.model.engine.meter
        with meter.measure() as reading:
            place = saving.save(self, where)
            meter.count(moved=self.cache.nbytes)
        self._recorded(self._unchanged(reading.account, "save"))
        return place

    @classmethod
    def load(cls, where: str | Path | Blobs, model: Model) -> Notebook:
        """Read a notebook that `save` wrote with the same model.

        Raises:
            InvalidArgumentError: `model` is not a `Model`.
            FingerprintMismatchError: the notebook was saved with another model, tokenizer or dtype.
            CorruptFileError: a file is missing, damaged, of another format version, or does not fit the model.
            StorageError: the notebook cannot be read.
        """
        require(model, Model, "loading a notebook needs a Model from load_model or wrap_model")
        with model.engine.meter.measure() as reading:
            notebook = saving.load(cls, where, model)
        notebook._recorded(notebook._unchanged(reading.account, "load"))
        return notebook

    def __reduce__(self) -> tuple[object, ...]:
        """For `pickle` and `copy`: everything that `save` writes, without the model.

        The process that unpickles it must have the same model loaded.

        Raises:
            NotPrefilledError: the notebook has no cache yet.
        """
        return saving.pickled(self)

    def __repr__(self) -> str:
        fields = "".join(f", {name}={reprlib.repr(value)}" for name, value in self.fields.items())
        return f"<Notebook on {self.model.name}: {len(self)} cached tokens{fields}>"

    def _repr_html_(self) -> str:
        from programmable_kv.notebook.html import tokens_html

        return tokens_html(self)
