"""What a notebook is made of: messages or text, fields and skills, and what is declared of them."""

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
    """A context that is written, message by message."""

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
        """A notebook from a request in the shape that chat clients send (OpenAI's). It is not prefilled yet.

        `content` may be None or a list of text parts; `tool_calls`, `tool_call_id`, `name` and `reasoning_content` go to the
        chat template.

        Args:
            fields: values or skills, as in `message`. `{name}` is a field in every content, in the tools' texts, and in strings
                of `template_kwargs`: with `template_kwargs={"date_string": "{today}"}` the date that a template writes is the
                field `today`.
            tools, template_kwargs, options: as in `Notebook`.

        Raises:
            UnknownFieldError: a field has no placeholder anywhere.
            InvalidValueError: a tool, a name or a value is not plain data; or a message is none, or has a special token that
                this tokenizer cannot write as plain text.
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
        """Add a chat message. `{name}` in `content` is a field for every name given here or declared before.

        A value is a string, number, boolean, date, time or None, which gives the field its type; or a `Field`, which says more
        about it. Where a `Skill` is given instead, the compiled skill is spliced in at its placeholder.

        Raises:
            InvalidArgumentError: role or content is no string.
            UnknownFieldError: a field given here has no placeholder in the content.
            InvalidValueError: a name or value is not plain data, or the content has a special token that this tokenizer cannot
                write as plain text.
            FingerprintMismatchError: another model compiled the skill.
            InvalidEditError: the notebook is made of raw text, a field was declared with another value, or a skill twice.
            AlreadyPrefilledError: the context was computed already.
        """
        require(role, str, "a message's role is a string")
        require(content, str, "a message's content is a string")
        values, skills = self._given(fields)
        inside = {name: skill.values for name, skill in skills.items()}
        self.prompt.add_message(role, content, values, inside, types_in(skills.values()))
        self._skills |= skills
        return self

    def text(self, content: str, /, **fields: Value | Skill) -> Self:
        """Add raw text, as the model will read it. Placeholders and errors as in `message`."""
        require(content, str, "a text is a string")
        values, skills = self._given(fields)
        inside = {name: skill.values for name, skill in skills.items()}
        self.prompt.add_text(content, values, inside, types_in(skills.values()))
        self._skills |= skills
        return self

    def field(self, name: str, value: Value) -> Self:
        """Add a field's value as raw text, right after what was added before."""
        return self.text("{" + name + "}", **{name: value})

    def skill(self, skill: Skill) -> Self:
        """Add a compiled skill as raw text, right after what was added before."""
        return self.text("{" + skill.name + "}", **{skill.name: skill})

    def mentions(self, name: str, /, *words: str) -> Self:
        """Declare by what words the text speaks of a field. From then on an edit of it computes its readers again.

        Readers are the lines that mention the field, and the open question; `readers` lists them. A line mentions it by its
        name, or by one of `words`: another name, its values, or the group that its value is looked up in. (The line that looks
        it up mentions the field, and so defines the group; the lines that mention the group read the field too.) To mark one
        line, give words of that line. Without `words` its name is all that the text calls it by. Of a block (`Field.block`)
        nothing need be declared for its lines: what a changed line is about counts by itself (`order` in "- order: shipped",
        `call Ann` in "- [x] call Ann").

        `name` may also be a word that was declared before: what is declared for a word counts for every field that declares the
        word, directly or through others. A chain of groups is said link by link, `mentions("tier", "band")` and
        `mentions("band", "desk")`, and the lines that mention `desk` read `tier`.

        May be called before and after prefill; saved with the notebook. `suggest_readers` finds what is missing: a line that
        reads the field and is not declared keeps what it noted.

        Raises:
            UnknownFieldError: there is no such field and no such word.
            InvalidArgumentError: a word without a letter or digit.
        """
        if not any(name in said for said in self._declared.words.values()):
            require_fields([name], self.fields)
        check_words(words)
        return self._declaring(self._declared.with_words({name: words}))

    def readable(self, name: str, /, *, by: str | ReadBy) -> Self:
        """Declare who may read a field's values, or a skill, under `visibility="design"`. Turns always may.

        Args:
            by: `mentions` (of a field, the lines that mention or hold it: the default), `all` (all text behind it, as in a
                causal context: nothing is missed, and an edit computes all of it again), or `turns` (nobody but turns, which
                is the default for a skill: an edit computes the value and the open question, and the model has to conclude
                everything there).

        May be called before and after prefill; saved with the notebook. What is to be read differently now counts as stale, and
        the next edit or `recompute` builds it again.

        Raises:
            UnknownFieldError: there is no such field or skill.
            InvalidArgumentError: there is no such choice, or not for a skill; or this notebook reads causally.
        """
        choice = choice_of(ReadBy, by, "a part is read by")
        if self.visibility is not Visibility.DESIGN:
            raise InvalidArgumentError(
                "in a causal notebook every token reads all text before it: build it with visibility='design' to say who reads "
                "what"
            )
        if name in self._skill_names():
            if choice is ReadBy.MENTIONS:
                raise InvalidArgumentError(f"a skill is read by all or by turns; {name!r} is a skill")
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
        """A state of this notebook with what is declared now: by design it says what was to be read."""
        if isinstance(state.ledger, Build):
            return replace(state, ledger=replace(state.ledger, declared=self._declared))
        return state

    def _given(self, fields: Mapping[str, Value | Skill]) -> tuple[dict[str, Value], dict[str, Skill]]:
        self._require_not_prefilled()
        values, skills = skills_among(fields)
        for skill in skills.values():
            skill.check_fits(self.model)
        return values, skills
