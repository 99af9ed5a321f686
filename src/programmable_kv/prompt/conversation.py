"""`Conversation`: the messages of a cached chat, and the text that further messages add to it.

Cached text is never rendered again. If the template would render earlier messages differently once another one follows,
only the new message is rendered: after neutral messages, whose text is then cut off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from programmable_kv.errors import TemplateError
from programmable_kv.prompt.chat import ender, frame, render_chat
from programmable_kv.prompt.parts import Message, Text, unmarked
from programmable_kv.prompt.template import HEAD_ROLES, ChatTemplate, mark, marked_json, neutral, sayings, says

_ELSEWHERE = (("user", "assistant"), ("system", "user", "assistant"))
"""roles of conversations after which most templates take any message"""
_PRIVATE_USE = re.compile("[\ue000-\uf8ff]")
_DIFFERS = "so the text differs from a fresh rendering of the conversation"


@dataclass(frozen=True, slots=True)
class Continuation:
    """What further messages add to a cached conversation."""

    added: str
    """the text to append to the cached text; plain text in it is marked (`parts.shielded`), as in the messages"""
    conversation: Conversation
    """the conversation with these messages"""
    why: str = ""
    """how the text differs from a fresh rendering of the whole conversation; empty if it does not"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Cached messages, and the text to which the template renders them.

    `values` fill the placeholders. They need not be the current values. They only have to be the same in each
    rendering, so that comparing two renderings shows what another message adds.
    """

    template: ChatTemplate
    messages: tuple[Message, ...]
    values: Mapping[str, str]
    text: str | None = field(default=None, repr=False)
    """the cached text, without errata and with the marks of plain text (`parts.shielded`); None if not rendered yet"""

    @property
    def opens_turn(self) -> bool:
        """Whether the text ends in the first user turn, at the point where that turn's content begins."""
        heads = all(message.role in HEAD_ROLES for message in self.messages)
        return heads and frame(self.template, self.messages, self.values).opens_turn

    @property
    def remarks(self) -> str:
        """What the template does with these messages that their author may not expect; empty if nothing."""
        found: list[str] = []
        heads = any(message.role in HEAD_ROLES for message in self.messages)
        if heads and (self.opens_turn or self.template.folds):
            found.append("the chat template has no separate system message here: its text begins the first user turn")
        if not self.opens_turn:
            text = self.template.filled(self.messages, self.values)
            pieces = self.template.skeleton(self.messages, self.values)
            if not says(text, pieces, _said(self.messages, self.values)):
                found.append(
                    "the chat template rewrites the text of some messages (it leaves out thoughts, or changes case)"
                )
        return "; ".join(found)

    def still_in(self, text: str, values: Mapping[str, str]) -> tuple[Message, ...]:
        """The messages; a message of which something was cut out of `text` is replaced by a neutral one.

        `values` are what the placeholders have now. Marks of skills are not looked for in the text.
        """
        return tuple(
            message if all(_is_in(saying, text) for saying in sayings(message, values)) else neutral(message.role)
            for message in self.messages
        )

    def continued(self, more: Sequence[Message], *, prompt_for_answer: bool = False) -> Continuation:
        """What the messages `more` add; with `prompt_for_answer`, also the opening of an answer.

        Raises:
            TemplateError: the template refuses a message, or drops, repeats, moves or rewrites what it says.
        """
        known = self._known()
        if (not more or more[0].role != "user") and self.opens_turn:
            raise TemplateError(
                "the chat template can put the system message only into the first user turn, and there is no user turn yet. "
                "Ask with a prompt, or add a user message first."
            )
        added = self._appended(known, more, prompt_for_answer)
        if added is not None:
            return Continuation(added, self._with(more, f"{known}{added}"))
        steps: list[str] = []
        reasons: list[str] = []
        conversation = self
        for number, message in enumerate(more, start=1):
            step = conversation._step([message], asks=prompt_for_answer and number == len(more))
            conversation = step.conversation
            steps.append(step.added)
            reasons += [step.why] if step.why and step.why not in reasons else []
        if not more:
            steps.append(self._apart((), asks=True))
            reasons.append(
                f"the chat template renders these messages differently when it asks for an answer, {_DIFFERS}"
            )
        return Continuation("".join(steps), conversation, "; ".join(reasons))

    def inserted(self, message: Message) -> str:
        """The text of a message in the form that it has elsewhere in a conversation, even if it is not allowed here.

        Raises:
            TemplateError: the template has no form for this message.
        """
        refused: TemplateError | None = None
        for roles in _ELSEWHERE:
            try:
                return self._behind([neutral(role) for role in roles], (message,), asks=False, template=self._bare)
            except TemplateError as error:
                refused = error
        assert refused is not None
        raise refused

    def answered(self, asked: str, prompt: Sequence[Message], answer: str, *, space: bool = False) -> Continuation:
        """What follows the text `asked` (a prompt and the opening of an answer) once the prompt is answered.

        The template may render an answer in another form than the opening has (it opens a thought, or later omits one).
        Then the answer stays after the opening as it was computed, and `why` says so. `space`: in this case, put a
        space before the answer if the opening does not end in white space.

        Raises:
            TemplateError: the template takes no answer here.
        """
        said = Message("assistant", Text(answer))
        try:
            usual = self.continued([*prompt, said])
        except TemplateError:
            usual = None
        if usual is not None and usual.added.startswith(asked):
            rest = usual.added[len(asked) :]
            if rest.lstrip().startswith(answer.strip()):
                return replace(usual, added=rest)
        plain = neutral("assistant")
        added = self.continued([*prompt, plain]).added
        closing = added.rpartition(plain.content.template)[2]
        between = " " if space and asked and not asked[-1].isspace() else ""
        rest = between + answer + closing
        known = self._known()
        conversation = self._with([*prompt, said], None if known is None else known + asked + rest)
        why = f"the chat template renders an answer differently once it is given; it stays as computed, {_DIFFERS}"
        return Continuation(rest, conversation, why)

    # -- how ---------------------------------------------------------------------------------------------------------

    def _known(self) -> str | None:
        """The cached text; None if it is unknown: it was computed turn by turn, saved, and now renders differently."""
        if self.text is not None:
            return self.text
        try:
            return render_chat(self.template, self.messages, self.values).text
        except TemplateError:
            return None

    def _with(self, more: Sequence[Message], text: str | None) -> Conversation:
        return Conversation(self.template, (*self.messages, *more), self.values, text)

    @property
    def _bare(self) -> ChatTemplate:
        """The template without tools: they are cached already, and some templates write them again in every turn."""
        return self.template.without_tools

    def _appended(self, known: str | None, more: Sequence[Message], asks: bool) -> str | None:
        """What the template appends to the cached text; None if it changes that text."""
        if known is None:
            return None
        messages = (*self.messages, *more)
        try:
            fresh = self.template.filled(messages, self.values, asks=asks)
            if not fresh.startswith(known):
                return None
            if not more:
                return fresh[len(known) :]
            pieces = self.template.skeleton(messages, self.values, since=len(self.messages), asks=asks)
            end = "" if asks else ender(self.template, messages, self.values)
        except TemplateError:
            return None
        if not pieces[0].startswith(known):
            return None
        added = fresh[len(known) :]
        if not says(added, (pieces[0][len(known) :], *pieces[1:]), _said(more, self.values)):
            return None
        return added.removesuffix(end)

    def _step(self, more: Sequence[Message], *, asks: bool) -> Continuation:
        """One message, appended to the cached text or rendered apart from it.

        Raises:
            TemplateError: neither is possible.
        """
        known = self._known()
        added = self._appended(known, more, asks)
        if added is not None:
            return Continuation(added, self._with(more, f"{known}{added}"))
        added = self._apart(more, asks)
        text = None if asks or known is None else known + added
        why = f"the chat template renders earlier turns differently once another follows; they stay as computed, {_DIFFERS}"
        return Continuation(added, self._with(more, text), why)

    def _apart(self, more: Sequence[Message], asks: bool) -> str:
        """A message's text, without what the message changes in earlier ones.

        It is rendered after these messages, with marks in place of what they say. If that fails, and the template
        renders the message once and in its place here and only changes earlier ones, it is rendered after these
        messages without those that instruct (some templates move a system message into the last user turn), or after a
        neutral question and answer.
        """
        try:
            return self._behind_either(self.messages, more, asks)
        except TemplateError as error:
            refused = error
        try:
            self.template.skeleton((*self.messages, *more), self.values, since=len(self.messages), asks=asks)
        except TemplateError:
            raise refused from None
        turns = [message for message in self.messages if message.role not in HEAD_ROLES]
        elsewhere = [[neutral(role) for role in roles] for roles in _ELSEWHERE] if more else []
        for history in (turns, *elsewhere):
            try:
                return self._behind_either(history, more, asks)
            except TemplateError:
                continue
        raise refused

    def _behind_either(self, history: Sequence[Message], more: Sequence[Message], asks: bool) -> str:
        """The text after other messages; rendered without tools, which are cached, if the template allows that."""
        if self.template.tools:
            try:
                return self._behind(history, more, asks=asks, template=self._bare)
            except TemplateError:
                pass
        return self._behind(history, more, asks=asks, template=self.template)

    def _behind(
        self, history: Sequence[Message], more: Sequence[Message], *, asks: bool, template: ChatTemplate
    ) -> str:
        """What messages add after others, found by rendering both with marks in place of what the others say.

        Raises:
            TemplateError: the text does not simply follow, or the template refuses, drops, repeats, moves or rewrites a
                message.
        """
        count = len(_said(history, self.values))
        if not count:
            raise TemplateError("the chat template renders this message only together with those before it")
        tail = frame(template, history, self.values).tail
        pieces = template.skeleton((*history, *more), self.values, asks=asks)[count:]
        whole = template.filled((*marked_json(history, self.values), *more), self.values, asks=asks)
        rest = whole.partition(mark(count - 1))[2]
        roles = " and ".join(message.role for message in more) or "next"
        if not says(rest, pieces, _said(more, self.values)):
            said = unmarked(" ".join(_said(more, self.values))).strip()
            raise TemplateError(
                f"the chat template drops or rewrites the {roles} message at this point: {said[:60]!r} is not in the "
                "rendered text. Use another role, or raw text parts."
            )
        if not rest.startswith(tail):
            raise TemplateError(
                f"the chat template renders a {roles} message only together with those before it, so a cached conversation "
                "cannot be continued with it. Use another role, or raw text parts."
            )
        end = "" if asks else ender(template, (*history, *more), self.values)
        return rest[len(tail) :].removesuffix(end)


def _said(messages: Sequence[Message], values: Mapping[str, str]) -> list[str]:
    return [saying for message in messages for saying in sayings(message, values)]


def _is_in(content: str, text: str) -> bool:
    """Whether the content of a message is in a text, apart from private-use characters (marks of skills)."""
    return all(piece.strip() in text for piece in _PRIVATE_USE.split(content))
