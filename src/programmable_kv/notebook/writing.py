"""`Written`: the base of `Notebook` with which its context is written: messages, text, fields, skills, declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from programmable_kv.arguments import choice_of, require, require_fields
from programmable_kv.design.build import Build
from programmable_kv.design.declared import Declared, ReadBy
from programmable_kv.design.visibility import Visibility
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.models.load import Model
from programmable_kv.notebook.live import Live
from programmable_kv.notebook.requests import declared, message_of
from programmable_kv.notebook.state import State
from programmable_kv.prompt.fields import Value
from programmable_kv.prompt.readers import check_words
from programmable_kv.skills.skill import Skill, skills_among, types_in


class Written(Live):
    """A context that is built message by message, or from raw text."""

    @classmethod
    def from_messages(
        cls,
        model: Model,
        messages: Sequence[Mapping[str, Any]],
        *,
        fields: Mapping[str, Value | Skill] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Build a notebook from a request in the format of OpenAI's chat API. The notebook is not prefilled yet.

        `content` may be None or a list of text parts. `tool_calls`, `tool_call_id`, `name` and `reasoning_content` go
        to the chat template.

        Args:
            fields: values or skills, as in `message`. `{name}` marks a field in any content, in the tools' texts, and
                in strings of `template_kwargs`: with `template_kwargs={"date_string": "{today}"}` the date that a
                template writes is the field `today`.
            tools, template_kwargs, options: as in `Notebook`.

        Raises:
            UnknownFieldError: a field has no placeholder anywhere.
            InvalidValueError: a tool, a name or a value is not plain data; a message is malformed; or a special token
                in a message cannot be written as plain text with this tokenizer.
            FingerprintMismatchError: another model compiled a skill.
        """
        notebook = cls(model, tools=tools, template_kwargs=template_kwargs, **options)
        prompt, given = notebook.prompt, fields or {}
        asked = [message_of(each, model.tokenizer) for each in messages]
        elsewhere = prompt.add_to_template(skills_among(given)[0])
        here = declared(asked, elsewhere, given)
        for message, own in zip(asked, here, strict=True):
            notebook.message(message.role, message.content.template, **own)
            prompt.messages = (*prompt.messages[:-1], replace(prompt.messages[-1], extra=message.extra))
        return notebook

    def message(self, role: str, content: str, /, **fields: Value | Skill) -> Self:
        """Add a chat message. `{name}` in `content` marks a field, for every name given here or in an earlier message.

        A value is a string, number, boolean, date, time or None, which sets the field's type; or a `Field`, which
        states the type and limits. If a `Skill` is given instead, the compiled skill is spliced in at its placeholder.

        Raises:
            InvalidArgumentError: `role` or `content` is not a string.
            UnknownFieldError: a field given here has no placeholder in the content.
            InvalidValueError: a name or value is not plain data, or a special token in the content cannot be written as
                plain text with this tokenizer.
            FingerprintMismatchError: another model compiled the skill.
            InvalidEditError: the notebook is built from raw text, a field was declared before with another value, or a
                skill was declared before.
            AlreadyPrefilledError: the notebook was prefilled before.
        """
        require(role, str, "a message's role is a string")
        require(content, str, "a message's content is a string")
        values, skills = self._given(fields)
        inside = {name: skill.values for name, skill in skills.items()}
        self.prompt.add_message(role, content, values, inside, types_in(skills.values()))
        self._skills |= skills
        return self

    def text(self, content: str, /, **fields: Value | Skill) -> Self:
        """Add raw text, which the model reads as it is, special tokens included. Fields and errors as in `message`."""
        require(content, str, "a text is a string")
        values, skills = self._given(fields)
        inside = {name: skill.values for name, skill in skills.items()}
        self.prompt.add_text(content, values, inside, types_in(skills.values()))
        self._skills |= skills
        return self

    def field(self, name: str, value: Value) -> Self:
        """Add a field as raw text, directly after the text added before."""
        return self.text("{" + name + "}", **{name: value})

    def skill(self, skill: Skill) -> Self:
        """Add a compiled skill to a raw-text notebook, directly after the text added before."""
        return self.text("{" + skill.name + "}", **{skill.name: skill})

    def mentions(self, name: str, /, *words: str) -> Self:
        """Declare the words by which the text refers to a field. By default, its edits then recompute its readers.

        Readers are the lines that mention the field, and the open question; `readers` lists them. A line mentions the
        field by its name or by one of `words`: another name, one of its values, or the group that its value is looked
        up in. (The line with the lookup mentions the field and defines the group; the lines that mention the group read
        the field too.) To mark a single line, give words of that line. A call without `words` says that the text uses
        only the field's name. The lines of a block (`Field.block`) need no declaration: an edit finds the lines that
        mention what a changed line is about (`order` in "- order: shipped", `call Ann` in "- [x] call Ann").

        `name` may also be a word that was declared before. What is declared for a word counts for every field that
        declares the word, directly or through other words. So a chain of groups is declared link by link: after
        `mentions("tier", "band")` and `mentions("band", "desk")`, the lines that mention `desk` read `tier`.

        You may call this before or after prefill, and `save` keeps it. A line that reads the field but is not declared
        keeps what it concluded from the old value; `suggest_readers` finds such lines.

        Raises:
            UnknownFieldError: `name` is neither a field nor a declared word.
            InvalidArgumentError: a word has no letter or digit.
        """
        if not any(name in said for said in self._declared.words.values()):
            require_fields([name], self.fields)
        check_words(words)
        return self._declaring(self._declared.with_words({name: words}))

    def readable(self, name: str, /, *, by: str | ReadBy) -> Self:
        """Declare what may read a field or a skill under `visibility="design"`. Turns always may.

        Args:
            by: `mentions` (the default for a field): the lines that mention or hold the field. `all`: all text after
                it, as in a causal context; nothing is missed, and an edit recomputes all of it. `turns` (the default
                for a skill): only turns; an edit recomputes the value and the open question, where the model has to
                conclude everything.

        You may call this before or after prefill, and `save` keeps it. Text for which it changes what may be read
        counts as stale, and the next edit or `recompute` recomputes it.

        Raises:
            UnknownFieldError: the notebook has no field or skill of that name.
            InvalidArgumentError: `by` is unknown, or is `mentions` for a skill; or the notebook is causal.
        """
        choice = choice_of(ReadBy, by, "by is")
        if self.visibility is not Visibility.DESIGN:
            raise InvalidArgumentError(
                "in a causal notebook every token reads all text before it: build it with visibility='design' to say who reads "
                "what"
            )
        if name in self._skill_names():
            if choice is ReadBy.MENTIONS:
                raise InvalidArgumentError(f"{name!r} is a skill, which only all or turns can read")
        else:
            require_fields([name], self.fields)
        return self._declaring(replace(self._declared, read_by={**self._declared.read_by, name: choice}))

    def _skill_names(self) -> set[str]:
        spliced = (skill.name for skill in self._skills.values())
        return {*spliced, *(unit.name for unit in self._state.context.units if unit.name)}

    def _declaring(self, declared: Declared) -> Self:
        if self._buffer is not None:
            self._ready()
        self._declared = declared
        self._state = self._declared_in(self._state)
        return self

    def _declared_in(self, state: State) -> State:
        """A state with the current declarations: under visibility="design" the ledger depends on them."""
        if isinstance(state.ledger, Build):
            return replace(state, ledger=replace(state.ledger, declared=self._declared))
        return state

    def _given(self, fields: Mapping[str, Value | Skill]) -> tuple[dict[str, Value], dict[str, Skill]]:
        self._require_not_prefilled()
        values, skills = skills_among(fields)
        for skill in skills.values():
            skill.check_fits(self.model)
        return values, skills
