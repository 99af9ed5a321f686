"""`Notebook.decide`: a decision among options, with an edit or a splice in the same forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from programmable_kv.arguments import require
from programmable_kv.cache.buffer import KVBuffer, Mark
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.plan import Plan
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.engine import Rows
from programmable_kv.errors import InvalidEditError
from programmable_kv.notebook.decision import Decision, best_of, option_ids, score
from programmable_kv.notebook.keeping import keep_choice
from programmable_kv.prompt.chat import answer_end, thought_closed
from programmable_kv.prompt.fields import Value
from programmable_kv.prompt.parts import Message, Rendered, Text
from programmable_kv.prompt.tokens import as_text
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.prompt.wording import THINK_INSTRUCTION
from programmable_kv.skills.skill import Skill

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook

THOUGHT_ENDS = ", so"
THOUGHT_LIMIT = 48
"""tokens of a thought, at most"""
_THOUGHTS_KEPT = 7
"""earlier thoughts that are kept as guesses for the next one"""


@dataclass(frozen=True, slots=True)
class Question:
    """The question and its options. Arguments as in `Notebook.decide`."""

    prompt: str | None
    options: Sequence[str]
    think: bool
    keep: bool

    def __post_init__(self) -> None:
        require(self.options, (list, tuple, str), "options are a list of strings")


@dataclass(frozen=True, slots=True)
class Change:
    """An edit or a splice to make before the question. Arguments and errors as in `Notebook.decide`."""

    edits: Mapping[str, Value] | None
    mode: str | Mode | None
    k: int
    skill: Skill | None
    repair: SeamRepair | None
    turns: str = "open"

    def __post_init__(self) -> None:
        if self.skill is None and self.repair is not None:
            raise InvalidEditError("a repair was given without a skill: give the skill as well")
        if self.skill is not None and self.edits:
            raise InvalidEditError("a skill and edits cannot go into one forward: edit first, or splice first")

    def plan(self, notebook: Notebook) -> Plan | None:
        """The plan of the change; None if there is none."""
        if self.skill is not None:
            return notebook.plan.splice(self.skill, repair=self.repair)
        return notebook.plan.edit(self.edits, mode=self.mode, k=self.k, turns=self.turns) if self.edits else None


@dataclass(frozen=True, slots=True)
class _Answered:
    """The logits after a question, and what the account says of the change before it."""

    logits: torch.Tensor
    known: dict[str, Any]
    """entries of the account"""
    reread: Mark | None = None
    """set if the last cached token was recomputed for its logits: the mark that restores its cached rows"""


def decide(notebook: Notebook, question: Question, change: Change) -> Decision:
    """Carry out `Notebook.decide`."""
    buffer, tokenizer = notebook.cache, notebook.model.tokenizer
    meter = notebook.model.engine.meter
    if question.keep:
        for option in question.options:
            as_text(option, tokenizer, "an option")
    if change.edits or change.skill is not None:
        notebook.model.engine.verify()
    thought = ""
    with notebook._transaction():
        with meter.measure() as reading:
            request = asked(notebook, question.prompt, think=question.think)
            text = request.text
            closed = thought_closed(text) if notebook._state.conversation is not None else text
            thoughts = (
                "" if closed == text else "the thought that the chat template opens was closed before the decision"
            )
            text = closed
            turn = tokenised(tokenizer, Rendered(text), Kind.TURN)
            answered = _ask(notebook, turn.ids, change.plan(notebook))
            logits = answered.logits
        with meter.measure() as scoring:
            prompt_end = turn.text or notebook._state.context.ends_with()
            if question.think:
                thought, logits = _think(notebook, logits)
                prompt_end = thought
            strings = option_ids(tokenizer, prompt_end, question.options, _answer_end(notebook))
            scores = score(notebook.model.engine, buffer, logits, strings)
            choice = best_of(question.options, scores)
            buffer.truncate(len(notebook) + (len(turn) if question.keep else 0))
            if answered.reread is not None:
                buffer.rollback(answered.reread)
            kept = ""
            if question.keep:
                prompt = question.prompt
                if prompt is not None and question.think:
                    prompt = _with_instruction(prompt)
                kept = keep_choice(notebook, turn, text, prompt, f"{thought} {choice}" if question.think else choice)
    log_probabilities = dict(zip(question.options, scores, strict=True))
    weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0).tolist()
    known = {**answered.known, **({"exactness": notebook._state.weakest} if question.keep else {})}
    reasons = (known.pop("why", ""), thoughts, request.why, kept)
    why = "; ".join(dict.fromkeys(filter(None, reasons)))
    account = notebook._recorded(reading.account.of(operation="decide", why=why, **known))
    return Decision(
        choice,
        dict(zip(question.options, weights, strict=True)),
        log_probabilities,
        account,
        scoring.account.of(exactness=account.exactness),
        thought,
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """The text that a prompt and the opening of an answer add to the rendered context."""

    text: str
    why: str = ""
    """how the text differs from a fresh rendering; empty if it does not"""


def asked(notebook: Notebook, prompt: str | None, *, think: bool) -> Asked:
    """
    Raises:
        InvalidValueError: a special token in the prompt cannot be written as plain text.
        TemplateError: the chat template does not take the prompt.
    """
    require(prompt, (str, type(None)), "a prompt is text, or None")
    if prompt is not None:
        prompt = as_text(_with_instruction(prompt) if think else prompt, notebook.model.tokenizer, "the prompt")
    conversation = notebook._ready().conversation
    if conversation is None:
        return Asked(prompt or "")
    more = [Message("user", Text(prompt))] if prompt is not None else []
    continued = conversation.continued(more, prompt_for_answer=True)
    return Asked(continued.added, continued.why)


def _ask(notebook: Notebook, ids: Sequence[int], plan: Plan | None) -> _Answered:
    """Carry out a plan (if there is one) and compute the prompt, in one forward. Returns the prompt's last logits."""
    if plan is None:
        return logits_after(notebook, ids)
    applied = notebook._applied(plan, followed_by=ids, logits=1)
    account = applied.account
    known = {
        "tokens_reused": account.tokens_reused,
        "mode_asked": account.mode_asked,
        "mode_used": account.mode_used,
        "why": account.why,
        "exactness": account.exactness,
    }
    if ids and applied.logits is not None:
        return _Answered(applied.logits, known)
    answered = logits_after(notebook, ids)
    return _Answered(answered.logits, known, answered.reread)


def logits_after(notebook: Notebook, ids: Sequence[int]) -> _Answered:
    """Compute a prompt and return the logits of its last token; of the context's last token if the prompt is empty."""
    engine, buffer = notebook.model.engine, notebook.cache
    known: dict[str, Any] = {"tokens_reused": len(notebook), "exactness": notebook._state.weakest}
    if ids:
        return _Answered(engine.append(buffer, ids), known)
    if not buffer.length:
        raise InvalidEditError("the context is empty, so there is nothing to answer: give a prompt, or add a turn")
    mark = buffer.mark()
    last = buffer.length - 1
    unit = next(unit for unit in reversed(notebook._state.context.units) if len(unit))
    row = Rows((unit.ids[-1],), (last,), (int(buffer.positions[last]),))
    return _Answered(engine.compute(buffer, row), known, mark)


def _think(notebook: Notebook, logits: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Decode a thought greedily up to the words that announce the decision. Returns it and the logits after it.

    A thought that does not end with these words within the limit gets them appended, so that the decision follows them.
    The thoughts of one notebook are much alike. So an earlier thought serves as a guess that is checked in one forward,
    which gives the same greedy tokens sooner (speculative decoding).
    """
    tokenizer, buffer = notebook.model.tokenizer, notebook.cache
    drawn: list[int] = []
    text = ""
    while len(drawn) < THOUGHT_LIMIT and not text.endswith(THOUGHT_ENDS):
        token = int(logits[-1].argmax())
        if token in stop_ids(notebook):
            break
        begun = [*drawn, token]
        guess = next((thought for thought in notebook._thoughts if thought[: len(begun)] == begun), begun)
        logits, agreed = _agreed(notebook, buffer, guess[len(drawn) :])
        drawn += agreed
        text = tokenizer.decode(drawn, skip_special_tokens=True)
    if drawn not in notebook._thoughts:
        notebook._thoughts = [*notebook._thoughts[-_THOUGHTS_KEPT:], drawn]
    if not text.endswith(THOUGHT_ENDS):
        closing = tokenizer.encode(THOUGHT_ENDS, add_special_tokens=False)
        logits = notebook.model.engine.append(buffer, closing)
        text += THOUGHT_ENDS
    return text, logits


def _agreed(notebook: Notebook, buffer: KVBuffer, guess: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Append the guessed tokens that greedy decoding agrees with; the first is given. Returns the last one's logits."""
    start = buffer.length
    logits = notebook.model.engine.append(buffer, guess, logits=len(guess))
    wanted = logits.argmax(dim=-1).tolist()
    kept = 1
    while kept < len(guess) and wanted[kept - 1] == guess[kept]:
        kept += 1
    buffer.truncate(start + kept)
    return logits[kept - 1 : kept], guess[:kept]


def stop_ids(notebook: Notebook) -> frozenset[int]:
    configured = notebook.model.engine.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*listed, notebook.model.tokenizer.eos_token_id] if token is not None)


def _answer_end(notebook: Notebook) -> int | None:
    """The token that ends an assistant's answer in this chat format; for raw text, the tokenizer's end token.

    It does not depend on the conversation, so options are scored in the same way after any context.
    """
    tokenizer = notebook.model.tokenizer
    if notebook._state.conversation is not None:
        after = tokenizer.encode(answer_end(tokenizer), add_special_tokens=False)
        if after:
            return int(after[0])
    return tokenizer.eos_token_id  # type: ignore[no-any-return]


def _with_instruction(prompt: str) -> str:
    return f"{prompt} {THINK_INSTRUCTION}"
