"""Notebook: a context of text and fields whose cache is edited instead of prefilled again.

notebook = Notebook(load_model())
notebook.message("system", "... order_status: {order_status} ...", order_status="shipped")
notebook.message("user", "Can I still cancel?")
notebook.prefill()
notebook.decide(options=["cancel", "deny"])
notebook.edit(order_status="pending")
notebook.decide(options=["cancel", "deny"])
"""

from __future__ import annotations

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
    """Text and fields, computed once, and then edited, asked, continued and composed in the cache.

    Build it from chat messages (`message`) or raw text (`text`, `field`), not both; `prefill` it once; then `edit`, `decide`,
    `generate`, `add`, `splice`, `cut`, in any order. Every operation returns or carries its `Account`, and `plan` shows what
    it would do. An operation that raises leaves the notebook unchanged.
    """

    def prefill(self, *, repair: SeamRepair | None = None, progress: Progress | None = None) -> Account:
        """Compute the whole context once; skills in it are spliced.

        Args:
            repair: which of the skills' tokens are computed again in their place.
            progress: called with (tokens done, tokens in all) after each chunk of a long text. If it raises, or on Ctrl-C, the
                notebook is unchanged.

        Raises:
            NotPrefilledError: there is nothing to prefill.
            AlreadyPrefilledError: it was prefilled already.
            UnverifiedError: there is a skill, and this model's keys cannot be moved.
            ContextOverflowError: the context is longer than the model's positions.
            TemplateError: the chat template changes what the messages say.
            InvalidEditError: a repair under visibility="design", where there is no seam.
        """
        self._require_not_prefilled()
        if self.prompt.empty:
            raise NotPrefilledError("the notebook is empty: add .message(...) or .text(...) before .prefill()")
        self._state, self._buffer, account = prefilling.prefill(self, repair, progress)
        return self._recorded(account)

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plans:
        """What an operation would do: `print(notebook.plan.edit(order_status="shipped"))`."""
        return Plans(self)

    def readers(self, name: str, *, turns: str = "open") -> tuple[Reader, ...]:
        """What `edit(..., mode="readers")` computes again besides the field itself: each piece of text, and why.

        Under `visibility="design"`, all that an edit computes again: what read the field, or read something that did.

        Args:
            turns: as `edit`.

        Raises:
            UnknownFieldError: there is no such field.
            InvalidArgumentError: `turns` is no such thing.
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
        """Which lines the model really uses a field on: those whose keys and values move when it takes another value.

        `print` it: a line that reads the field and has no declared word is listed as missed, and `.words` is what to pass to
        `mentions`. The notebook is unchanged. It costs a copy of the cache and one computation of all that follows the field,
        and more where that is stale. With `options`, the decision is made before and after the edit, by full prefill and by
        readers, and once more for each missed line: what that line closes of the distance to full prefill.

        Args:
            value: another value of the field; other values may be read on other lines.
            prompt, options: a decision that depends on the field, as for `decide`.
            share: how far a line moves to be suggested, as a share of the line that moves farthest.
            turns: as `edit`; turns that are computed again in any case are not listed.

        Raises:
            InvalidArgumentError: `share` or `turns` is no such thing.
            UnknownFieldError, InvalidValueError, ContextOverflowError, UnverifiedError: as `edit` in mode `readers`.
            InvalidOptionsError: the options cannot be compared.
        """
        return suggest(self, name, value, prompt, options, share, turns)

    def _readers_in(self, context: Context, name: str, turns: Turns, words: Sequence[str] = ()) -> tuple[Reader, ...]:
        """The readers of a field; `words` are what they may mention besides its name and what was declared."""
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
        """Give fields new values: `edit(order_status="pending")`, or a mapping for names that are no keywords or options.

        A field keeps its type: a value that is not of it is refused.

        Args:
            mode: one of `Mode`. When None, `readers` if `mentions` was called for every one of these fields, and else
                `field_erratum`; or `suffix` where that computes no more tokens.
            k: for `selective`, how many later tokens to recompute besides the field's own.
            turns: for `readers`, which turns are computed again: `open` (those since the last answer), `keep` (none), `all`.

        Raises:
            InvalidArgumentError: `k` or `turns` is no such thing.
            UnknownFieldError, InvalidValueError, InvalidEditError: the edit is not one.
            ContextOverflowError: the new value or the erratum does not fit.
            UnverifiedError: the value's token length changes and this model's keys cannot be relocated.
        """
        return self._carry_out(self.plan.edit(changes, mode=mode, k=k, turns=turns, **fields))

    def rebase(self, *, limit: int | None = None) -> Account:
        """Fold errata back: write their values into the fields' places, drop the lines, and recompute from there.

        Args:
            limit: compute at most so many tokens; as many fields are folded, from the last one backwards, as this allows.

        Raises:
            ContextOverflowError: the new text does not fit.
        """
        return self._carry_out(self.plan.rebase(limit=limit))

    def splice(self, skill: Skill, /, *, at: int | Part | None = None, repair: SeamRepair | None = None) -> Account:
        """Put a compiled skill into the live context.

        Args:
            at: the slot (or the part) before which it goes; the context's end when None.
            repair: which of its tokens are computed again in their place.

        Raises:
            UnverifiedError: keys of this model cannot be moved.
            FingerprintMismatchError: another model compiled it.
            InvalidValueError: a value here speaks of a field of the skill's, or one of the skill's of a field here.
            ContextOverflowError: it does not fit.
            UnknownPartError: there is no such slot or part.
            InvalidEditError: `at` is no place in the text, or a field of the skill has another value here.
        """
        return self._carry_out(self.plan.splice(skill, at=at, repair=repair))

    def cut(self, what: str | Part | Span, /) -> Account:
        """Take a part (a skill's name, or a piece of the context) out. What follows is relocated.

        Raises:
            UnverifiedError: keys of this model cannot be moved.
            UnknownPartError: there is no such part.
            InvalidEditError: the span's ends are no places in the text.
        """
        return self._carry_out(self.plan.cut(what))

    def move(self, what: str | Part | Span, /, *, to: int | Part | None = None) -> Account:
        """Move a part before the slot (or part) `to`; to the context's end when None.

        Only what lies between is touched; a part that is there already costs nothing.

        Raises:
            UnverifiedError: keys of this model cannot be moved.
            UnknownPartError: there is no such part.
            InvalidEditError: `to` lies inside it or is no place in the text.
        """
        return self._carry_out(self.plan.move(what, to=to))

    def replace(self, what: str | Part | Span, skill: Skill, /, *, repair: SeamRepair | None = None) -> Account:
        """Exchange a part for a skill, in its place. Raises as `cut` and `splice` do."""
        return self._carry_out(self.plan.replace(what, skill, repair=repair))

    def recompute(self, start: int | Part | None = None) -> Account:
        """Compute everything from a slot (or part) on again, on what precedes it; from the first inexact token when None.

        From the context's first inexact token on, this makes all of it exact for the current text. (A value that only an
        erratum states is still stated by the erratum: `rebase` writes it into its place.)

        Raises:
            UnknownPartError: there is no such slot or part.
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
        """Append a turn to the live context: what the user said, a tool's result, the assistant's own answer.

        For a raw-text notebook the role is not rendered: the content is appended unchanged.

        Args:
            content: text, text parts, or None for an assistant that only calls tools.
            tool_calls, tool_call_id, name: as chat clients send them, for the chat template.

        Raises:
            InvalidValueError: the content has a special token that cannot be plain text, or the role is no word.
            TemplateError: the chat template cannot continue this conversation with that role, or drops what it says.
            ContextOverflowError: it does not fit.
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
        """Carry out a plan that was made for the state now; `followed_by` goes into the buffer only."""
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
        """Which option the model would answer. The prompt and the answer are taken back; an edit or a splice stays.

        Args:
            prompt: asked as a user message (or raw text); None asks for the answer to what the context ends with. A thought
                that the chat template opens for the answer is closed first: options are answers, not thoughts.
            options: at least two strings, compared as wholes.
            edits, mode, k, turns: an edit to make first, in the same forward as the prompt: the cheapest way to do both.
            skill, repair: a skill to splice in at the context's end first, its seam in the same forward as the prompt.
            think: let the model restate the field in one line before it decides. With a prompt, an instruction to do so is
                added to it; without one, the context is expected to end with such a request.
            keep: let the prompt and the answer become turns of the context. The prompt is not computed again for that.

        Raises:
            InvalidOptionsError: the options cannot be compared.
            InvalidEditError: an edit and a splice at once, or a repair without a skill.
            UnknownFieldError, UnverifiedError, FingerprintMismatchError, ContextOverflowError: as `edit` and `splice`.
            InvalidValueError: the prompt, or an option that is to be kept, has a special token that cannot be plain text.
            TemplateError: the chat template does not take the prompt or, with `keep`, the answer.
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
        """Stream an answer as pieces of text; greedy at temperature 0.

        With `keep` the prompt and the answer become turns of the context; otherwise they are taken back when the
        stream ends or is closed. Until then every other operation is refused. `last_account` has the price afterwards, and
        in `why` what ended the answer if the model did not.

        Args:
            temperature, top_k, top_p, min_p: as in transformers; the last three have an effect only above temperature 0.
            repetition_penalty: as in transformers: on every token of the context, the prompt and the answer so far.
            logit_bias: what to add to the logits of tokens: of one, by its id; or of a text, which is raised or lowered at its
                last token where the tokens before it have just been said.
            stop: strings that end the answer; it ends before the first one to be complete. Text that may be the beginning of
                one is held back until it is known.
            max_seconds: end the answer with the first token that is drawn after this time.
            watch: called with each token of the answer when it is drawn, and with the model's log-probabilities there [V],
                before temperature, penalties and biases. The token that ends an answer is not one of them.

        Raises:
            OutOfStepError: another stream is open, or the notebook was rolled back under this one, or changed before it began.
            InvalidValueError: the prompt has a special token that cannot be plain text.
            InvalidArgumentError: a parameter is of the wrong type or out of its range.
            InvalidEditError: the context and the prompt are empty.
            TemplateError: the chat template does not take the prompt, or (with `keep`) the answer.
            ContextOverflowError: prompt or answer do not fit; some text may have been yielded, and the context is unchanged.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, logit_bias=logit_bias, stop=stop, max_seconds=max_seconds,
        )  # fmt: skip
        return streaming.stream(self, prompt, sampling, keep=keep, watch=watch)

    # -- state -------------------------------------------------------------------------------------------------

    def mark(self) -> NotebookMark:
        """Remember this state. Costs nothing until something is overwritten."""
        return NotebookMark(self.cache.mark(), self._state)

    def rollback(self, mark: NotebookMark) -> Account:
        """Return to a mark, at the cost of what was overwritten since; it and later marks are used up.

        Raises:
            CacheBufferError: the mark is used up, or another notebook's.
        """
        require(mark, NotebookMark, "a mark is what `mark` returned")
        with self.model.engine.meter.measure() as reading:
            self.cache.rollback(mark.buffer)
        self._state = self._declared_in(mark.state)
        return self._recorded(self._unchanged(reading.account, "rollback"))

    def release(self, mark: NotebookMark) -> None:
        """Keep what happened since a mark; it and later marks are used up.

        Raises:
            OutOfStepError: a stream is open, which has a mark of its own.
        """
        require(mark, NotebookMark, "a mark is what `mark` returned")
        self._ready()
        self.cache.release(mark.buffer)

    def fork(self) -> Self:
        """An independent notebook in the same state. Copies the cache; its `last_account` says what that cost."""
        state = self._ready()
        other = type(self)(
            self.model, erratum_template=self.erratum_template, ranking=self.ranking, visibility=self.visibility
        )
        other.prompt, other._skills, other._state = self.prompt, self._skills, state
        other._declared = self._declared
        with self.model.engine.meter.measure() as reading:
            other._buffer = self.cache.fork()
        other._recorded(other._unchanged(reading.account, "fork"))
        return other

    def save(self, where: str | Path | Blobs) -> Path | str:
        """Write the notebook (text, fields, keys and values) to a folder, any fsspec URL, or `Blobs` of your own, in one step.

        Returns the place.

        Raises:
            NotPrefilledError: there is no cache to save yet.
            CorruptFileError: something else than a saved notebook lies there.
            StorageError: it cannot be written; what was saved there before is unchanged.
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
            InvalidArgumentError: this is no model.
            FingerprintMismatchError: it was saved from another model, tokenizer or dtype.
            CorruptFileError: a file is missing, damaged, of another format version, or does not fit the model.
            StorageError: it cannot be read.
        """
        require(model, Model, "a notebook is loaded onto a Model, as load_model and wrap_model make it")
        with model.engine.meter.measure() as reading:
            notebook = saving.load(cls, where, model)
        notebook._recorded(notebook._unchanged(reading.account, "load"))
        return notebook

    def __reduce__(self) -> tuple[object, ...]:
        """For `pickle` and `copy`: all that `save` writes, without the model.

        The process that reads it must have loaded the same model, and still hold it.

        Raises:
            NotPrefilledError: there is no cache yet.
        """
        return saving.pickled(self)

    def __repr__(self) -> str:
        fields = "".join(f", {name}={value!r}" for name, value in self.fields.items())
        return f"<Notebook on {self.model.name}: {len(self)} cached tokens{fields}>"

    def _repr_html_(self) -> str:
        from programmable_kv.notebook.html import tokens_html

        return tokens_html(self)
