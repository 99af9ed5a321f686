"""What a chat template can do with a notebook, found by rendering: one row for each template. Needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from programmable_kv.errors import TemplateError
from programmable_kv.notebook.plans import AS_USER, INSERTED, erratum_message
from programmable_kv.prompt.chat import render_chat
from programmable_kv.prompt.conversation import Conversation
from programmable_kv.prompt.parts import Message, Text
from programmable_kv.prompt.template import ChatTemplate

_REFUSED = "refused"
_LINE = "[STATE UPDATE] Status is now: lost."


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """How a notebook works with one chat template."""

    system: str
    """where a system message stands"""
    mid_conversation: str
    """whether it takes a system message after a user turn"""
    tool: str
    """whether it takes a tool's result after an answer"""
    multi_turn: str
    """whether a continued conversation has the text of a fresh rendering"""
    erratum: str
    """how an edit after a user turn states the new value"""
    agent: str
    """whether errata and answered turns can alternate after a policy with a field, and for values of which case"""


COLUMNS = tuple(field.name for field in fields(TemplateRow))


def survey(tokenizer: Any) -> TemplateRow:
    """Render small conversations with a tokenizer's chat template, and describe the result in a row."""
    template = ChatTemplate(tokenizer, fold_system=True)
    system, user = Message("system", Text("Be brief.")), Message("user", Text("Hello."))
    started = Conversation(template, (system, user), {})
    return TemplateRow(
        _system(template, system, user),
        _taken(started, Message("system", Text("Be kind."))),
        _taken(started, Message("assistant", Text("Yes.")), Message("tool", Text("It was lost."))),
        _multi_turn(started),
        _erratum(started),
        _agent(template),
    )


def survey_of_text(chat_template: str) -> TemplateRow:
    """The row of a template without a tokenizer: `<s>` is its beginning-of-text token and `</s>` its end token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return survey(tokenizer)


def page(rows: dict[str, TemplateRow]) -> list[str]:
    """The rows as lines of a Markdown table."""
    names = [name.replace("_", "-") for name in COLUMNS]
    lines = [f"| template | {' | '.join(names)} |", f"|{' --- |' * (len(names) + 1)}"]
    return [*lines, *(f"| {name} | {' | '.join(_cells(row))} |" for name, row in sorted(rows.items()))]


def _cells(row: TemplateRow) -> list[str]:
    return [getattr(row, name) for name in COLUMNS]


def _system(template: ChatTemplate, system: Message, user: Message) -> str:
    if template.folds:
        try:
            render_chat(template, [system, user], {})
        except TemplateError:
            return _REFUSED
        return "first user turn, when asked"
    try:
        return "first user turn" if Conversation(template, (system,), {}).opens_turn else "own message"
    except TemplateError:
        return _REFUSED


def _taken(conversation: Conversation, *messages: Message) -> str:
    why = ""
    try:
        for message in messages:
            continuation = conversation.continued([message])
            conversation, why = continuation.conversation, continuation.why
    except TemplateError:
        return _REFUSED
    return "yes, apart from earlier turns" if why else "yes"


def _multi_turn(conversation: Conversation) -> str:
    reasons: list[str] = []
    try:
        opening = conversation.continued([], prompt_for_answer=True).added
        conversation, why = _answered(conversation, [])
        reasons.append(why)
        for _ in range(2):
            conversation, why = _answered(conversation, [Message("user", Text("And now?"))])
            reasons.append(why)
    except TemplateError:
        return _REFUSED
    thought = ", opens a thought" if "<think>" in opening else ""
    return ("turns stay as computed" if any(reasons) else "as rendered afresh") + thought


def _answered(conversation: Conversation, prompt: Sequence[Message]) -> tuple[Conversation, str]:
    asked = conversation.continued(prompt, prompt_for_answer=True)
    answered = conversation.answered(asked.added, prompt, "YES.")
    return answered.conversation, "; ".join(filter(None, [asked.why, answered.why]))


def _erratum(conversation: Conversation) -> str:
    try:
        _, why = erratum_message(conversation, _LINE)
    except TemplateError:
        return _REFUSED
    return {"": "system message", AS_USER: "user message", INSERTED: "user message, inserted"}[why]


def _agent(template: ChatTemplate) -> str:
    for value, note in (("pending", ""), ("PENDING", ", values in upper case")):
        values = {"status": value}
        policy = Message("system", Text("It is {status} today.", ("status",)))
        try:
            text = render_chat(template, [policy], values).text
            conversation = Conversation(template, (policy,), values, text)
            for _ in range(2):
                erratum_message(conversation, _LINE)
                conversation, _ = _answered(conversation, [Message("user", Text("And now?"))])
        except TemplateError:
            continue
        return "yes" + note
    return _REFUSED
