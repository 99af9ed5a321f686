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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from programmable_kv.cache.buffer import KVBuffer, Mark
from programmable_kv.cache.span import Span
from programmable_kv.edits.plan import DEFAULT_MODE, Mode
from programmable_kv.edits.splicing import SeamRepair
from programmable_kv.engine import Rows
from programmable_kv.errors import InvalidEditError, OutOfStepError, TemplateError
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision, best_of, option_ids, score
from programmable_kv.notebook.editing import Editing, parse_mode
from programmable_kv.prompt.parts import Message, Rendered, Text
from programmable_kv.prompt.units import Kind, Unit, tokenised
from programmable_kv.prompt.values import check_no_markers
from programmable_kv.prompt.wording import THINK_INSTRUCTION
from programmable_kv.skills.skill import Skill

_THOUGHT_ENDS = ", so"
_THOUGHT_LIMIT = 48


class Notebook(Editing):
    """A cached context that can be edited.

    Build it from chat messages (`message`) or raw text (`text`, `field`), not both; `prefill` it once; then `edit`,
    `decide`, `generate`, `add`, in any order. Every operation returns or carries its `Account`. An operation that
    raises leaves the notebook as it was.
    """

    # -- asking ------------------------------------------------------------------------------------------------

    def decide(
        self,
        prompt: str | None = None,
        options: Sequence[str] = (),
        *,
        edits: Mapping[str, str] | None = None,
        mode: str | Mode = DEFAULT_MODE,
        k: int = 32,
        skill: Skill | None = None,
        repair: SeamRepair | None = None,
        think: bool = False,
        keep: bool = False,
    ) -> Decision:
        """Which option the model would answer. The prompt and the answer are taken back; an edit or a splice stays.

        Args:
            prompt: asked as a user message (or raw text); None asks for the answer to what the context ends with.
            options: at least two strings, compared as wholes.
            edits, mode, k: an edit to make first, in the same forward as the prompt: the cheapest way to do both.
            skill, repair: a skill to splice in at the context's end first, its seam in the same forward as the prompt.
            think: let the model restate the field in one line before it decides. With a prompt, an instruction to do so is
                added to it; without one, the context is expected to end with such a request.
            keep: let the prompt and the answer become turns of the context. The prompt is not computed again for that.

        Raises:
            InvalidOptionsError: the options cannot be compared.
            InvalidEditError: an edit and a splice at once, or a repair without a skill.
            UnknownFieldError, UnverifiedError, FingerprintMismatchError, ContextOverflowError: as `edit` and `splice`.
            InvalidValueError: the prompt has special tokens, or an option that is to be kept has.
            TemplateError: the chat template does not take the prompt; or, with `keep`, renders an answer in another way than
                it asks for one.
        """
        buffer = self._filled()
        tokenizer = self.model.tokenizer
        thought = ""
        chosen = parse_mode(mode)
        if edits:
            self._prepare(chosen)
        if skill is None and repair is not None:
            raise InvalidEditError("there is a repair and no skill to repair: give the skill as well")
        if skill is not None:
            if edits:
                raise InvalidEditError("a skill and edits cannot go into one forward: edit first, or splice first")
            self.model.engine.verify()
        if keep:
            for option in options:
                check_no_markers(option, tokenizer, "an option")
        with self._transaction() as meter:
            with meter.measure() as reading:
                asked = self._prompt(prompt, think=think)
                turn = tokenised(tokenizer, asked, Kind.TURN)
                if skill is None:
                    done = self._ask(list(turn.ids), edits, chosen, k)
                else:
                    done = self._ask_with(skill, list(turn.ids), repair)
                logits = done.logits
            with meter.measure() as scoring:
                prompt_end = asked.text or self._context.text
                if think:
                    thought, logits = self._think(buffer, logits)
                    prompt_end = thought
                strings = option_ids(tokenizer, prompt_end, options, self._answer_end)
                scores = score(self.model.engine, buffer, logits, strings)
                choice = best_of(options, scores)
                buffer.truncate(len(self._context) + (len(turn) if keep else 0))
                if done.reread is not None:
                    buffer.rollback(done.reread)
                if keep:
                    said = None if prompt is None else _with_instruction(prompt) if think else prompt
                    self._keep(turn, said, f"{thought} {choice}" if think else choice)
        log_probabilities = dict(zip(options, scores, strict=True))
        weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0).tolist()
        return Decision(
            choice,
            dict(zip(options, weights, strict=True)),
            log_probabilities,
            self._account(reading.account, done.reused, done.note),
            scoring.account,
            thought,
        )

    def _keep(self, turn: Unit, said: str | None, answer: str) -> None:
        """Let a prompt, which is computed already, and the answer to it become turns."""
        more: list[Message] = []
        if self._messages:
            more = [Message("user", Text(said))] if said is not None else []
            more.append(Message("assistant", Text(answer)))
            whole = self._continuation(more).text
        else:
            end = turn.text or self._context.text
            whole = turn.text + ("" if not end or end[-1].isspace() else " ") + answer
        if not whole.startswith(turn.text):
            raise TemplateError(
                "the chat template renders an answer in another way than it asks for one, so the prompt cannot stay as it "
                "was computed. Decide without keep, and add both turns."
            )
        context = self._context.copy()
        if len(turn):
            context.append(turn)
        unit = tokenised(self.model.tokenizer, Rendered(whole[len(turn.text) :]), Kind.TURN)
        self.model.engine.append(self._filled(), unit.ids, logits=0)
        context.append(unit)
        self._context = context
        self._messages += more

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
            InvalidEditError: no tokens are asked for, a temperature is negative, or the context and the prompt are empty.
            TemplateError: the chat template does not take the prompt, or (with `keep`) the answer.
            ContextOverflowError: prompt or answer do not fit; what was yielded before stands, and the context is as it was.
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

        buffer = self._require_in_step()
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
            prompt = _with_instruction(prompt)
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
        if not buffer.length:
            raise InvalidEditError("the context is empty, so there is nothing to answer: give a prompt, or add a turn")
        mark = buffer.mark()
        last = buffer.length - 1
        row = Rows((self._context.ids[last],), (last,), (int(buffer.positions[last]),))
        return _Answered(self.model.engine.compute(buffer, row), reused, note, mark)

    def _ask_with(self, skill: Skill, ids: list[int], repair: SeamRepair | None) -> _Answered:
        """Splice a skill in at the end and compute the prompt, in one forward."""
        end = len(self._context)
        done = self._spliced(skill, Span(end, end), repair, ids)
        if done.logits is not None:
            return _Answered(done.logits, end, done.note)
        return replace(self._ask(ids, None, DEFAULT_MODE, 0), reused=end, note=done.note)

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
            text = self.model.tokenizer.decode(said, skip_special_tokens=True)
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

    def save(self, where: str | Path) -> Path | str:
        """Write the notebook (text, fields, keys and values) to a folder or any fsspec URL, in one step. Returns the place.

        Raises:
            NotPrefilledError: there is no cache to save yet.
            CorruptFileError: something else than a saved notebook lies there.
            StorageError: it cannot be written; what was saved there before is unchanged.
        """
        from programmable_kv.storage.notebooks import SavedNotebook, write

        buffer = self._require_in_step()
        meter = self.model.engine.meter
        with meter.measure() as reading:
            state = SavedNotebook(
                self.erratum_template, tuple(self._messages), self.written_values, self._context, buffer.tensors()
            )
            place = write(state, where, self.model)
            meter.bytes_moved += buffer.nbytes
        self._account(reading.account, len(self._context))
        return place

    @classmethod
    def load(cls, where: str | Path, model: Model) -> Notebook:
        """Read a notebook that `save` wrote with the same model.

        Raises:
            FingerprintMismatchError: it was saved from another model, tokenizer or dtype.
            CorruptFileError: a file is missing, damaged, of another format version, or does not fit the model.
            StorageError: it cannot be read.
        """
        from programmable_kv.storage.notebooks import read

        with model.engine.meter.measure() as reading:
            state = read(where, model)
            notebook = cls(model, erratum_template=state.erratum_template)
            notebook._messages, notebook._values = list(state.messages), dict(state.values)
            buffer = model.engine.new_buffer(len(state.context))
            buffer.load_tensors(dict(state.tensors))
            notebook._context, notebook._buffer = state.context, buffer
        notebook._account(reading.account, len(notebook))
        return notebook


def _with_instruction(prompt: str) -> str:
    return f"{prompt} {THINK_INSTRUCTION}"


@dataclass(frozen=True, slots=True)
class _Answered:
    """The logits after a prompt, with the cached tokens left alone and the note of an edit made on the way."""

    logits: torch.Tensor
    reused: int
    note: str
    reread: Mark | None = None
    """where the last cached token was computed again for its logits: what to return to, so that it stays as it was"""
