"""`Notebook.generate`: an answer is generated token by token on the notebook's own cache, and streamed as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from programmable_kv.account import Account
from programmable_kv.errors import OutOfStepError
from programmable_kv.notebook.asking import Asked, asked, logits_after, stop_ids
from programmable_kv.notebook.keeping import keep_drawn
from programmable_kv.notebook.sampling import Sampler, Sampling, Watch
from programmable_kv.notebook.state import State
from programmable_kv.notebook.stopping import Deadline, StopStrings
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, Unit, tokenised

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook


@dataclass(slots=True)
class _Answer:
    """The answer so far."""

    drawn: list[int] = field(default_factory=list)
    text: str = ""
    cost: Account = field(default_factory=Account)
    ended: str = ""
    """why the answer ended; empty if the model ended it"""


def stream(
    notebook: Notebook, prompt: str | None, sampling: Sampling, *, keep: bool, watch: Watch | None = None
) -> Iterator[str]:
    """Carry out `Notebook.generate`. Whatever can be refused is refused here, before the stream begins."""
    request = asked(notebook, prompt, think=False)
    turn = tokenised(notebook.model.tokenizer, Rendered(request.text), Kind.TURN)
    model, before = notebook.model, (*notebook.ids, *turn.ids)
    sampler = Sampler(sampling, before, model.tokenizer, model.engine.vocabulary, watch)
    return _streamed(notebook, notebook._ready(), prompt, request, turn, sampling, sampler, keep=keep)


def _streamed(
    notebook: Notebook,
    state: State,
    prompt: str | None,
    request: Asked,
    turn: Unit,
    sampling: Sampling,
    sampler: Sampler,
    *,
    keep: bool,
) -> Iterator[str]:
    """The stream. Each token is measured while it is drawn, so work done between two tokens is not counted."""
    if notebook._ready() is not state:
        raise OutOfStepError("the notebook was changed before this stream began: ask again")
    buffer = notebook.cache
    mark = buffer.mark()
    notebook._stream_open = True
    answer = _Answer()
    kept = ""
    try:
        for piece in _pieces(notebook, turn, sampling, sampler, answer):
            answer.text += piece
            if piece:
                yield piece
            if not buffer.holds(mark):
                raise OutOfStepError("the notebook was rolled back while this stream was open: it ends here")
        if keep:
            notebook._stream_open = False
            with buffer.meter.measure() as reading:
                kept = keep_drawn(notebook, turn, request.text, prompt, answer.drawn, answer.text)
            answer.cost = answer.cost + reading.account
            buffer.release(mark)
    finally:
        notebook._stream_open = False
        if buffer.holds(mark):  # the answer is not kept, or keeping it failed
            buffer.rollback(mark)
            notebook._state = state
    why = "; ".join(dict.fromkeys(filter(None, (answer.ended, request.why, kept))))
    notebook._recorded(
        answer.cost.of(
            operation="generate", tokens_reused=len(state.context), exactness=notebook._state.weakest, why=why
        )
    )


def _pieces(notebook: Notebook, turn: Unit, sampling: Sampling, sampler: Sampler, answer: _Answer) -> Iterator[str]:
    """The answer's text: one piece for each drawn token, which may be empty, and what was held back at the end."""
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    stops, deadline = StopStrings(sampling.stop), Deadline(sampling.max_seconds)
    answer.ended = f"the answer ended after {sampling.max_new_tokens} tokens (max_new_tokens)"
    for token, account in _drawn(notebook, turn, sampling, sampler):
        answer.cost = answer.cost + account
        if token is None:
            answer.ended = ""
            break
        answer.drawn.append(token)
        sampler.tell(token)
        yield stops.passed(decoder.step(notebook.model.tokenizer.backend_tokenizer, token) or "")
        if stops.found is not None:
            answer.ended = f"the answer ended before {stops.found!r} (stop)"
            return
        if deadline.passed:
            answer.ended = f"the answer ended after {sampling.max_seconds:g} seconds (max_seconds)"
            break
    yield stops.rest()


def _drawn(
    notebook: Notebook, turn: Unit, sampling: Sampling, sampler: Sampler
) -> Iterator[tuple[int | None, Account]]:
    """An answer's tokens, each with the cost of drawing it, in any thread. None means that the model ends the answer.

    The last token may not be in the cache.
    """
    engine, buffer = notebook.model.engine, notebook.cache
    with buffer.meter.measure() as reading:
        logits = logits_after(notebook, turn.ids).logits
    first = reading.account
    tokens = engine.stream(buffer, logits, stop_ids(notebook), sampler.choose)
    for _ in range(sampling.max_new_tokens):
        with buffer.meter.measure() as reading:
            token = next(tokens, None)
        yield token, first + reading.account
        if token is None:
            return
        first = Account()
