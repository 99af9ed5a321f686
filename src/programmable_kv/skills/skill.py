"""A skill: a text compiled once, alone, whose cache is spliced wherever it is needed.

A skill may be a policy, a tool's description, a document or a tool's result. Compiled alone it has read only itself, so
its keys and values are correct at any position, in any context, except for what its tokens would have read from the
text before them. Seam repair reduces that difference, and so does a *preface*: text like the text that will precede the
skill, which the skill reads while it is compiled, and which is not part of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from programmable_kv.account import Account
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Words
from programmable_kv.design.visibility import Visibility
from programmable_kv.errors import FingerprintMismatchError
from programmable_kv.models.load import Model
from programmable_kv.prompt.fields import FieldType, Value
from programmable_kv.prompt.units import Unit
from programmable_kv.skills.draft import Draft, Preface


@dataclass(frozen=True, slots=True)
class Skill:
    """A compiled text: its tokens (`unit`), the values of the fields in it, and its keys and values (`segment`)."""

    name: str
    unit: Unit
    values: Mapping[str, str]
    segment: Segment = field(repr=False)
    fingerprint: str
    """the fingerprint of the model that compiled it"""
    account: Account
    """the cost of compiling it"""
    preface: str = ""
    """text that it read while it was compiled, and that is not part of it"""
    preface_ids: tuple[int, ...] = ()
    """the preface's tokens; without a preface the token that begins every text, if the tokenizer has one"""
    rounded: bool = False
    """whether it was stored in fewer bits than it was computed in: then it is close, but never exact"""
    types: Mapping[str, FieldType] = field(default_factory=dict)
    """the types of the fields in it"""
    pieces: tuple[Unit, ...] = ()
    """for a skill compiled by design: its units, with each value as a separate unit"""
    mentions: Words = field(default_factory=dict)
    """for a skill compiled by design: field -> other words by which its lines mention the field"""

    @property
    def text(self) -> str:
        return self.unit.text

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def packed(self) -> bytes:
        """The token ids, four bytes each, as in a ledger."""
        return array("I", self.unit.ids).tobytes()

    @property
    def packed_preface(self) -> bytes:
        """The preface's token ids, four bytes each."""
        return array("I", self.preface_ids).tobytes()

    @property
    def placed(self) -> tuple[Unit, ...]:
        """The skill's units, for a context, under the skill's name."""
        words = tuple((name, tuple(said)) for name, said in sorted(self.mentions.items()))
        return tuple(
            replace(unit, name=self.name, read=self.preface_ids, words=words) for unit in self.pieces or (self.unit,)
        )

    @property
    def visibility(self) -> Visibility:
        """The visibility under which it was compiled; a skill without pieces is causal."""
        return Visibility.DESIGN if self.pieces else Visibility.CAUSAL

    @classmethod
    def compile(
        cls,
        model: Model,
        text: str,
        values: Mapping[str, Value] | None = None,
        /,
        *,
        name: str | None = None,
        role: str | None = None,
        preface: Preface = "",
        visibility: str | Visibility = Visibility.CAUSAL,
        mentions: Words | None = None,
        **fields: Value,
    ) -> Skill:
        """Compute a text behind a preface, or alone (behind the token that begins every text, if there is one).

        Args:
            text: the skill's text; it may have `{field}` placeholders as in `Notebook.message`.
            values, fields: the fields' values; fields named like an option (`name`, `role`, `preface`) go into
                `values`.
            name: the skill's name in a context; None makes one from a digest of its text and preface.
            role: render it as a chat message of this role, to be spliced between turns (a tool's result, for example).
            preface: text that the skill reads while it is computed and that is then discarded: text of the kind that
                will precede it. What the skill concludes from the preface stays in its keys and values. Directly behind
                exactly these tokens the skill is exact. With a `role`, the preface's last message is closed.
            visibility: `design` is for a notebook under `visibility="design"`: a field in the skill is read only by the
                skill's lines that mention it, so that an edit recomputes only these. A skill without fields does not
                need it.
            mentions: with `design`, field -> other words by which the skill's lines mention it, as in
                `Notebook.mentions`. A notebook takes over these words with the skill.

        Raises:
            InvalidArgumentError: `visibility` is not causal or design, or `mentions` are not valid or given without
                `design`.
            UnverifiedError: with `design`, rows cannot be recomputed exactly on this model.
            InvalidValueError: the text is empty, it or the preface has a special token that cannot be plain text, or a
                name or value is not plain data.
            UnknownFieldError: a field has no placeholder in the text, or `mentions` name something that is not a field
                of it.
            ContextOverflowError: the skill and the preface are longer than the model's positions.
            TemplateError: the chat template rejects a message of that role, or the preface.
        """
        draft = Draft.of(model, text, {**(values or {}), **fields}, name, role, preface, visibility, mentions)
        return compute_drafts(model, [draft])[0]

    @classmethod
    def compile_together(
        cls,
        model: Model,
        texts: Mapping[str, str],
        values: Mapping[str, Value] | None = None,
        /,
        *,
        preface: Preface = "",
        between: str = "",
        **fields: Value,
    ) -> list[Skill]:
        """Compile several texts in one forward; the preface of each consists of all texts before it.

        Spliced in this order, behind the same preface and with the same text between them, all skills are exact. In
        another order, or if only some are used, each is a skill that has read the earlier ones in `texts`, including
        their values.

        Args:
            texts: name -> text, in order; `{field}` placeholders as in `compile`. Put text that changes often last.
            values, fields: the fields' values; each applies to every text that has its placeholder.
            preface: text that the first skill reads, and so all of them; as in `compile`.
            between: text between two skills, which belongs to neither ("\\n\\n" in an `Agent`). Placeholders in it or
                in the preface are plain text.

        Raises:
            InvalidValueError, UnknownFieldError, ContextOverflowError, TemplateError: as in `compile`; or there is no
                text.
        """
        return compute_drafts(model, Draft.together(model, texts, {**(values or {}), **fields}, preface, between))

    def check_fits(self, model: Model) -> None:
        """
        Raises:
            FingerprintMismatchError: the skill was compiled by another model, tokenizer or dtype.
        """
        check_fingerprint(self.name, self.fingerprint, model)


def compute_drafts(model: Model, drafts: Sequence[Draft]) -> list[Skill]:
    """Compute drafts, each behind the one before it, in one forward from position 0.

    Each account counts the skill's own tokens and those since the end of the previous skill; their sum is the total
    cost.
    """
    last = drafts[-1]
    if last.pieces:
        model.engine.require_rows(instead="Compile it without visibility='design'.")
    with model.engine.meter.measure() as reading:
        buffer = model.engine.new_buffer(last.end)
        rows, reads = last.rows()
        model.engine.compute(buffer, rows, logits=0, reads=reads)
    skills: list[Skill] = []
    paid = 0
    for draft in drafts:
        share = (draft.end - paid) / last.end
        account = replace(reading.account, tokens_computed=draft.end - paid, seconds=share * reading.account.seconds)
        segment = buffer.segment(Span(len(draft.preface_ids), draft.end), draft.unit.ids)
        skills.append(
            Skill(
                draft.name,
                draft.unit,
                draft.values,
                segment,
                model.fingerprint,
                account,
                draft.preface,
                draft.preface_ids,
                types=draft.types,
                pieces=draft.pieces,
                mentions=draft.mentions,
            )
        )
        paid = draft.end
    return skills


def check_fingerprint(name: str, fingerprint: str, model: Model) -> None:
    """
    Raises:
        FingerprintMismatchError: the skill of that name was compiled by another model, tokenizer or dtype.
    """
    if fingerprint != model.fingerprint:
        raise FingerprintMismatchError(
            f"skill {name!r} was compiled by a model with fingerprint {fingerprint[:8]}; this model's is "
            f"{model.fingerprint[:8]} ('{model.name}'). Keys and values only fit the weights, tokenizer and dtype that "
            "made them: compile it again."
        )


def skills_among(fields: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, Skill]]:
    """Separate a message's keyword arguments into plain values and skills."""
    skills = {name: value for name, value in fields.items() if isinstance(value, Skill)}
    return {name: value for name, value in fields.items() if name not in skills}, skills


def types_in(skills: Iterable[Skill]) -> dict[str, FieldType]:
    """The types of the fields in some skills."""
    return {name: kind for skill in skills for name, kind in skill.types.items()}
