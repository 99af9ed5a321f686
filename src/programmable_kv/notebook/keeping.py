"""Making a prompt and its answer turns of the context. Tokens that are already cached are not computed again."""

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
    """Make a streamed answer and its prompt turns. Returns how the text differs from a fresh rendering, in words.

    Tokens that are already cached are not computed again. If this raises, the caller must restore the earlier state.

    Args:
        drawn: the answer's tokens as the model generated them. All but the last one are cached.
    """
    cached = drawn[: notebook.cache.length - len(notebook._state.context) - len(turn)]
    whole, conversation, why = _whole(notebook, asked, prompt, answer, space=False)
    _adopt(notebook, turn, whole, cached, conversation)
    return why


def keep_choice(notebook: Notebook, turn: Unit, asked: str, prompt: str | None, answer: str) -> str:
    """Make a prompt, which is already computed, and a chosen answer turns. Returns what `keep_drawn` returns."""
    whole, conversation, why = _whole(notebook, asked, prompt, answer, space=True)
    _adopt(notebook, turn, whole, [], conversation)
    return why


def _whole(
    notebook: Notebook, asked: str, prompt: str | None, answer: str, *, space: bool
) -> tuple[str, Conversation | None, str]:
    """The text that follows a prompt once it is answered, the new conversation, and how it differs from a fresh text.

    `prompt` and `answer` are unmarked; all other texts have the marks of `as_text`.

    Args:
        asked: the text of the prompt as computed, with the opening of an answer.
        space: put a space before the answer where the template would render the answer in another way than it is
            cached.
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
    """Enter a prompt that is in the buffer, and an answer that may begin with the `cached` tokens; compute the rest."""
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
