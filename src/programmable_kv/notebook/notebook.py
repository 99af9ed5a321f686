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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from programmable_kv.account import Account
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Rows
from programmable_kv.errors import ContextOverflowError, InvalidEditError, OutOfStepError, TemplateError
from programmable_kv.model import Model
from programmable_kv.notebook.composition import Composition
from programmable_kv.notebook.context import Context, Kind, Unit, tokenised
from programmable_kv.notebook.decision import Decision, option_ids, score
from programmable_kv.notebook.edits import DEFAULT_MODE, REFRESHES_FIELD, EditPlan, Mode, plan_edit
from programmable_kv.notebook.parts import Message, Rendered, Text
from programmable_kv.notebook.values import check_no_markers, check_value
from programmable_kv.notebook.wording import THINK_INSTRUCTION, statement

_THOUGHT_ENDS = ", so"
_THOUGHT_LIMIT = 48
_ERRATUM_ROLES = ("system", "user")


class Notebook(Composition):
    """A cached context that can be edited.

    Build it from chat messages (`message`) or raw text (`text`, `field`), not both; `prefill` it once; then `edit`,
    `decide`, `generate`, `add`, in any order. Every operation returns or carries its `Account`. An operation that
    raises leaves the notebook as it was.
    """

    # -- editing -----------------------------------------------------------------------------------------------

    def edit(
        self,
        changes: Mapping[str, str] | None = None,
        /,
        *,
        mode: str | Mode = DEFAULT_MODE,
        k: int = 32,
        **fields: str,
    ) -> Account:
        """Give fields new values: `edit(order_status="pending")`, or a mapping for names that are no keywords.

        Args:
            mode: one of `Mode`.
            k: for `selective`, how many later tokens to recompute besides the field's own.

        Raises:
            UnknownFieldError, InvalidValueError, InvalidEditError: the edit is not one.
            ContextOverflowError: the new value or the erratum does not fit.
            UnverifiedError: the value's token length changes and this model's keys cannot be relocated.
        """
        chosen = parse_mode(mode)
        self._prepare(chosen)
        with self._transaction() as meter, meter.measure() as reading:
            done = self._edit({**(changes or {}), **fields}, chosen, k)
        return self._account(reading.account, done.reused, done.note)

    def _prepare(self, mode: Mode) -> None:
        """Have the model's checks done once, before any clock runs: they are no part of an operation's price."""
        if mode in REFRESHES_FIELD:
            self.model.engine.verify()

    def _edit(
        self, changes: Mapping[str, str], mode: Mode, k: int, then: Sequence[int] = (), logits: int = 0
    ) -> _Edited:
        """Carry out an edit and compute the tokens `then` after it, in one forward. Logits are of the last rows."""
        buffer = self._filled()
        self._require_known(changes)
        if not changes:
            raise InvalidEditError("the edit names no field; give at least one, as field=value")
        for name, value in changes.items():
            check_value(name, value, self.model.tokenizer, self.erratum_template, self._context.fields)
        plan, after = plan_edit(
            self._context, changes, mode, tokenizer=self.model.tokenizer, write_erratum=self._erratum
        )
        if plan.relocates:
            layout = self.model.engine.require_relocation()
        if mode in REFRESHES_FIELD and plan.compute and plan.compute != tuple(range(plan.compute[0], len(after))):
            self.model.engine.require_rows()
        limit = self.model.position_limit
        if limit is not None and len(after) + len(then) > limit:
            raise ContextOverflowError(
                f"after this edit the context needs {len(after) + len(then)} positions, and the model has {limit}. Use a "
                "shorter value, or start a new notebook."
            )
        extra: set[int] = set()
        if mode is Mode.SELECTIVE:
            extra = self._most_influential(buffer, plan, after, changes, then, k)
        buffer.truncate(plan.keep)
        for move in plan.moves:
            buffer.relocate(move.start, buffer.length, move.to, move.to - move.start, layout)
        slots = sorted({*plan.compute, *extra})
        if mode is Mode.SELECTIVE:
            after.refreshed = frozenset(extra)
            after.note_computed(extra)
        rows = _rows(buffer, after.ids, slots)
        end = rows.positions[-1] + 1 if rows.slots and rows.slots[-1] == len(after) - 1 else buffer.next_position
        rows = rows.then(Rows.appended(then, len(after), end))
        output = None
        if rows.slots:
            output = self.model.engine.compute(buffer, rows, logits=min(logits, len(rows)))
        self._context = after
        moved = {slot for move in plan.moves for slot in range(move.to, len(after))}
        return _Edited(output, len(after) - len(moved.union(slots)), plan.note)

    def _most_influential(
        self, buffer: KVBuffer, plan: EditPlan, after: Context, changes: Mapping[str, str], then: Sequence[int], k: int
    ) -> set[int]:
        """The k later slots (as of after the edit) that the ranking puts first."""
        if k < 1:
            raise InvalidEditError(f"selective needs k >= 1, got {k}; for the field alone use mode='in_place'")
        reader = Rows.appended(then, buffer.length, buffer.next_position)
        if not then:  # nothing is asked yet: the context's last token reads
            last = buffer.length - 1
            reader = Rows((self._context.ids[last],), (last,), (int(buffer.positions[last]),))
        scores = self.ranking.scores(self.model.engine, buffer, reader)
        growth = sum(move.to - move.start for move in plan.moves)
        first = min(after.first_place(name) for name in changes) - 1
        own = {*plan.compute, *(slot for name in changes for span in after.spans(name) for slot in span.range)}
        shifts = sorted((move.start, move.to - move.start) for move in plan.moves)
        candidates = []
        for slot in range(plan.keep):
            target = slot + sum(shift for start, shift in shifts if slot >= start)
            if target not in own and first < target < plan.keep + growth:
                candidates.append((float(scores[slot]), target))
        return {target for _, target in sorted(candidates, reverse=True)[:k]}

    def _erratum(self, context: Context, name: str, value: str) -> Unit:
        line = statement(self.erratum_template, name, value)
        if not self._messages:
            rendered = Rendered(line + "\n" if context.text.endswith("\n") else f"\n{line}\n")
        else:
            rendered = self._erratum_message(line)
        return tokenised(self.model.tokenizer, rendered, Kind.ERRATUM, corrects=((name, value),))

    def _erratum_message(self, line: str) -> Rendered:
        """The line as a message of its own, in the first role that the chat template takes there."""
        for role in _ERRATUM_ROLES:
            try:
                return self._continuation([Message(role, Text(line))])
            except TemplateError as error:
                refused = error
        raise TemplateError(
            f"the chat template takes no update at this point, neither as a system nor as a user message ({refused}). Use "
            "mode='suffix', which appends nothing; or build the notebook from raw text."
        )

    # -- asking ------------------------------------------------------------------------------------------------

    def decide(
        self,
        prompt: str | None = None,
        options: Sequence[str] = (),
        *,
        edits: Mapping[str, str] | None = None,
        mode: str | Mode = DEFAULT_MODE,
        k: int = 32,
        think: bool = False,
    ) -> Decision:
        """Which option the model would answer. The prompt and the answer are taken back; an edit stays.

        Args:
            prompt: asked as a user message (or raw text); None asks for the answer to what the context ends with.
            options: at least two strings, compared as wholes.
            edits, mode, k: an edit to make first, in the same forward as the prompt: the cheapest way to do both.
            think: let the model restate the field in one line before it decides. With a prompt, an instruction to do so is
                added to it; without one, the context is expected to end with such a request.
        """
        buffer = self._filled()
        tokenizer = self.model.tokenizer
        thought = ""
        chosen = parse_mode(mode)
        if edits:
            self._prepare(chosen)
        with self._transaction() as meter:
            with meter.measure() as reading:
                asked = self._prompt(prompt, think=think)
                ids = list(tokenised(tokenizer, asked, Kind.TURN).ids)
                done = self._ask(ids, edits, chosen, k)
                logits = done.logits
            with meter.measure() as scoring:
                prompt_end = asked.text or self._context.text
                if think:
                    thought, logits = self._think(buffer, logits)
                    prompt_end = thought
                strings = option_ids(tokenizer, prompt_end, options, self._answer_end)
                scores = score(self.model.engine, buffer, logits, strings)
                buffer.truncate(len(self._context))
        log_probabilities = dict(zip(options, scores, strict=True))
        weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0).tolist()
        return Decision(
            max(log_probabilities, key=lambda option: log_probabilities[option]),
            dict(zip(options, weights, strict=True)),
            log_probabilities,
            self._account(reading.account, done.reused, done.note),
            scoring.account,
            thought,
        )

    def generate(
        self,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        keep: bool = False,
    ) -> Iterator[str]:
        """Stream an answer as pieces of text; greedy at temperature 0.

        With `keep` the prompt and the answer become turns of the context; otherwise they are taken back when the
        stream ends or is closed. Until then every other operation is refused. `last_account` has the price afterwards.

        Raises:
            OutOfStepError: another stream is open, or the notebook was rolled back under this one.
            InvalidValueError: the prompt has special tokens.
        """
        asked = self._prompt(prompt, think=False)
        if max_new_tokens < 1:
            raise InvalidEditError(f"an answer has at least one token, got max_new_tokens={max_new_tokens}")
        if temperature < 0:
            raise InvalidEditError(f"a temperature is at least 0, got {temperature}")
        self._require_in_step()
        return self._stream(prompt, asked, max_new_tokens, temperature, seed, keep)

    def _stream(
        self, prompt: str | None, asked: Rendered, max_new_tokens: int, temperature: float, seed: int, keep: bool
    ) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        buffer = self._filled()
        ids = list(tokenised(self.model.tokenizer, asked, Kind.TURN).ids)
        said: list[int] = []
        stream = DecodeStream(skip_special_tokens=True)
        answer = ""
        mark = buffer.mark()
        length = len(self._context)
        with self.model.engine.meter.measure() as reading:
            try:
                logits = self._ask(ids, None, DEFAULT_MODE, 0).logits
                tokens = (
                    self.model.engine.stream_sampled(buffer, logits, self._stop_ids, temperature, seed)
                    if temperature > 0
                    else self.model.engine.stream_greedy(buffer, logits, self._stop_ids)
                )
                for token in tokens:
                    said.append(token)
                    piece = stream.step(self.model.tokenizer.backend_tokenizer, token)
                    if piece:
                        answer += piece
                        yield piece
                    if not buffer.holds(mark):
                        raise OutOfStepError("the notebook was rolled back while this stream was open: it ends here")
                    if len(said) >= max_new_tokens:
                        break
            finally:
                if buffer.holds(mark):
                    buffer.rollback(mark)
        account = reading.account
        if keep:
            # Both turns or neither. The model's own words are not checked for markers: they are what it said.
            with self._transaction():
                if prompt is not None:
                    account = account + self._append_turn("user", prompt)
                account = account + self._append_turn("assistant", answer)
        self._account(account, length)

    @property
    def _stop_ids(self) -> frozenset[int]:
        configured = self.model.engine.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return frozenset(token for token in [*listed, self.model.tokenizer.eos_token_id] if token is not None)

    def _prompt(self, prompt: str | None, *, think: bool) -> Rendered:
        if prompt is not None:
            check_no_markers(prompt, self.model.tokenizer, "the prompt")
        if think and prompt is not None:
            prompt = f"{prompt} {THINK_INSTRUCTION}"
        if not self._messages:
            return Rendered(prompt or "")
        asked = [Message("user", Text(prompt))] if prompt is not None else []
        return self._continuation(asked, prompt_for_answer=True)

    @cached_property
    def _answer_end(self) -> int | None:
        """The token that closes an assistant's answer in this chat format; the tokenizer's end token for raw text."""
        tokenizer = self.model.tokenizer
        if self._messages:
            try:
                rendered = self._continuation([Message("user", Text("?")), Message("assistant", Text("Yes"))]).text
            except TemplateError:
                return tokenizer.eos_token_id  # type: ignore[no-any-return]
            after = tokenizer.encode(rendered.rpartition("Yes")[2], add_special_tokens=False)
            if after:
                return int(after[0])
        return tokenizer.eos_token_id  # type: ignore[no-any-return]

    def _ask(self, ids: list[int], edits: Mapping[str, str] | None, mode: Mode, k: int) -> _Answered:
        """Edit (if asked to) and compute the prompt; the logits of its last token."""
        buffer = self._filled()
        reused, note = len(self._context), ""
        if edits:
            done = self._edit(edits, mode, k, then=ids, logits=1)
            reused, note = done.reused, done.note
            if ids and done.logits is not None:
                return _Answered(done.logits, reused, note)
        elif ids:
            return _Answered(self.model.engine.append(buffer, ids), reused, note)
        # Nothing new to read from: the context's last token is computed once more, for its logits.
        last = buffer.length - 1
        row = Rows((self._context.ids[last],), (last,), (int(buffer.positions[last]),))
        return _Answered(self.model.engine.compute(buffer, row), reused, note)

    def _think(self, buffer: KVBuffer, logits: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Greedy tokens up to the words that announce the decision; the thought, and the logits after it.

        A thought that ends otherwise, or not at all, is closed with those words: the decision must follow something.
        Thoughts of one notebook are much alike, so an earlier one is guessed and checked in one forward: the same greedy
        tokens, sooner.
        """
        said: list[int] = []
        text = ""
        while len(said) < _THOUGHT_LIMIT and not text.endswith(_THOUGHT_ENDS):
            token = int(logits[-1].argmax())
            if token in self._stop_ids:
                break
            begun = [*said, token]
            guess = next((thought for thought in self._thoughts if thought[: len(begun)] == begun), begun)
            logits, agreed = self._agreed(buffer, guess[len(said) :])
            said += agreed
            text = self.model.tokenizer.decode(said)
        if said not in self._thoughts:
            self._thoughts.append(said)
        if not text.endswith(_THOUGHT_ENDS):
            closing = self.model.tokenizer.encode(_THOUGHT_ENDS, add_special_tokens=False)
            logits = self.model.engine.append(buffer, closing)
            text += _THOUGHT_ENDS
        return text, logits

    def _agreed(self, buffer: KVBuffer, guess: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Append as many guessed tokens as greedy decoding would have said (the first is given); their last one's logits."""
        start = buffer.length
        logits = self.model.engine.append(buffer, guess, logits=len(guess))
        wanted = logits.argmax(dim=-1).tolist()
        kept = 1
        while kept < len(guess) and wanted[kept - 1] == guess[kept]:
            kept += 1
        buffer.truncate(start + kept)
        return logits[kept - 1 : kept], guess[:kept]

    # -- keeping -----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the notebook (text, fields, keys and values) to a folder, atomically. See `persistence.py`."""
        from programmable_kv.notebook.persistence import save

        buffer = self._require_in_step()
        meter = self.model.engine.meter
        with meter.measure() as reading:
            path = save(self, Path(folder))
            meter.bytes_moved += buffer.nbytes
        self._account(reading.account, len(self._context))
        return path

    @classmethod
    def load(cls, folder: str | Path, model: Model) -> Notebook:
        """Read a notebook that `save` wrote with the same model.

        Raises:
            FingerprintMismatchError: it was saved from another model, tokenizer or dtype.
            CorruptFileError: a file is missing, damaged, or of another format version.
        """
        from programmable_kv.notebook.persistence import load

        with model.engine.meter.measure() as reading:
            notebook = load(Path(folder), model)
        notebook._account(reading.account, len(notebook))
        return notebook


@dataclass(frozen=True, slots=True)
class _Edited:
    """An edit that was carried out: the logits asked for, the tokens it left alone, and what it did beyond the asked."""

    logits: torch.Tensor | None
    reused: int
    note: str


@dataclass(frozen=True, slots=True)
class _Answered:
    """The logits after a prompt, with the cached tokens left alone and the note of an edit made on the way."""

    logits: torch.Tensor
    reused: int
    note: str


def parse_mode(mode: str | Mode) -> Mode:
    """
    Raises:
        InvalidEditError: there is no such mode; the message lists them.
    """
    try:
        return Mode(mode)
    except ValueError:
        raise InvalidEditError(f"there is no edit mode {mode!r}; the modes are: {', '.join(Mode)}") from None


def _rows(buffer: KVBuffer, ids: Sequence[int], slots: Sequence[int]) -> Rows:
    """Rows for some slots. A replaced or appended slot stands one position after the slot before it."""
    positions: dict[int, int] = {}
    for slot in slots:
        before = positions.get(slot - 1, int(buffer.positions[slot - 1]) if 0 < slot <= buffer.length else -1)
        positions[slot] = before + 1 if slot else 0
    return Rows(tuple(ids[slot] for slot in slots), tuple(slots), tuple(positions.values()))
