"""A prompt and its answer become turns of the context. What is in the cache already is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from programmable_kv.edits.entries import adopted
from programmable_kv.notebook.state import State
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.parts import Message, Rendered, Text
from programmable_kv.prompt.tokens import as_text
from programmable_kv.prompt.units import Kind, Unit, tokenised

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook


def keep_drawn(
    notebook: Notebook, turn: Unit, asked: str, prompt: str | None, drawn: Sequence[int], answer: str
) -> str:
    """Let a streamed answer and its prompt become turns; in words, how the text differs from a fresh rendering.

    Tokens that are cached already are not computed. If it raises, the caller has to return to the state of before.

    Args:
        drawn: the answer's tokens as the model said them, all but the last of them cached.
    """
    cached = drawn[: notebook.cache.length - len(notebook._state.context) - len(turn)]
    whole, conversation, why = _whole(notebook, asked, prompt, answer, space=False)
    _adopt(notebook, turn, whole, cached, conversation)
    return why


def keep_choice(notebook: Notebook, turn: Unit, asked: str, prompt: str | None, answer: str) -> str:
    """Let a prompt, which is computed already, and a chosen answer become turns. Returns as `keep_drawn`."""
    whole, conversation, why = _whole(notebook, asked, prompt, answer, space=True)
    _adopt(notebook, turn, whole, [], conversation)
    return why


def _whole(
    notebook: Notebook, asked: str, prompt: str | None, answer: str, *, space: bool
) -> tuple[str, Conversation | None, str]:
    """What follows a prompt's own text once it is answered, the conversation then, and how it differs from a fresh text.

    All texts have the marks of `as_text`, but for the prompt and the answer as they are given.

    Args:
        asked: the prompt's own text, with the opening of an answer.
        space: put one before an answer that stays as computed.
    """
    tokenizer, conversation = notebook.model.tokenizer, notebook._state.conversation
    answer = as_text(answer, tokenizer, "the answer")
    if conversation is None:
        between = "" if not asked or asked[-1].isspace() else " "
        return between + answer, None, ""
    more = [Message("user", Text(as_text(prompt, tokenizer, "the prompt")))] if prompt is not None else []
    answered = conversation.answered(asked, more, answer, space=space)
    return answered.added, answered.conversation, answered.why


def _adopt(
    notebook: Notebook, turn: Unit, answer: str, cached: Sequence[int], conversation: Conversation | None
) -> None:
    """Enter a prompt that is in the buffer, and an answer of which the tokens `cached` may be; compute the rest of it."""
    buffer, state = notebook.cache, notebook._state
    unit = tokenised(notebook.model.tokenizer, Rendered(answer), Kind.TURN)
    shared = 0
    while shared < min(len(cached), len(unit)) and cached[shared] == unit.ids[shared]:
        shared += 1
    context, ledger = adopted(state.context, state.ledger, turn, len(turn))
    buffer.truncate(len(context) + shared)
    whole, ledger = adopted(context, ledger, unit, shared)
    rest = unit.ids[shared:]
    if rest:
        notebook.model.engine.append(buffer, rest, logits=0)
        _, ledger = adopted(context, ledger, unit, len(unit))
    notebook._state = State(whole, ledger, conversation)
