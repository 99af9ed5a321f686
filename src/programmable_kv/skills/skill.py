"""A skill: a text compiled once, alone, whose cache is spliced wherever it is needed.

A policy, a tool's description, a document, a tool's result. Compiled alone it has seen nothing but itself, so its
keys and values are right at any position, in any context, except for what its tokens would have read from the text before
them. Seam repair reduces that difference, and so does a *preface*: text like the one that will precede the skill, which it
reads while it is compiled, and which is not part of it.
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
    """of the model that compiled it"""
    account: Account
    """what compiling it cost"""
    preface: str = ""
    """what it read while it was compiled, and does not hold"""
    preface_ids: tuple[int, ...] = ()
    """its tokens; without a preface the one that begins every text, where the tokenizer has one"""
    rounded: bool = False
    """kept in fewer bits than it was computed in: close, and never exact"""
    types: Mapping[str, FieldType] = field(default_factory=dict)
    """of the fields in it"""
    pieces: tuple[Unit, ...] = ()
    """of one that was compiled by design: its units, the values apart"""
    mentions: Words = field(default_factory=dict)
    """of one that was compiled by design: what else its lines say when they speak of a field"""

    @property
    def text(self) -> str:
        return self.unit.text

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def packed(self) -> bytes:
        """Its token ids, four bytes each, as a ledger keeps them."""
        return array("I", self.unit.ids).tobytes()

    @property
    def packed_preface(self) -> bytes:
        """The token ids of its preface, four bytes each."""
        return array("I", self.preface_ids).tobytes()

    @property
    def placed(self) -> tuple[Unit, ...]:
        """Its text as units of a context, under its name."""
        words = tuple((name, tuple(said)) for name, said in sorted(self.mentions.items()))
        return tuple(
            replace(unit, name=self.name, read=self.preface_ids, words=words) for unit in self.pieces or (self.unit,)
        )

    @property
    def visibility(self) -> Visibility:
        """How its tokens read each other."""
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
        """Compute a text alone (behind the token that begins every text, where the tokenizer has one), or behind a preface.

        Args:
            text: what it says; `{field}` placeholders as in `Notebook.message`.
            values, fields: the fields' values; those of fields that are called `name`, `role` or `preface` in `values`.
            name: what it is called in a context; a digest of its text and preface when None.
            role: render it as a chat message of this role, to be spliced between turns (a tool's result, say).
            preface: text that it reads while it is computed and that is then discarded: text of the kind that will precede it.
                What it concludes from the preface stays in its keys and values. Right behind exactly these tokens it is exact.
                With a `role`, the preface's last message is closed.
            visibility: `design`, for a notebook under `visibility="design"`: a field in the skill is read by those of its lines
                that mention it, so that an edit computes just these again. Without fields in it a skill needs none.
            mentions: with `design`, field -> what else its lines say when they speak of the field, as `Notebook.mentions`.
                The notebook that it comes into takes these words over.

        Raises:
            InvalidArgumentError: there is no such visibility, or words are declared for one that has no use for them.
            UnverifiedError: `design`, and this model cannot compute with a mask of its own.
            InvalidValueError: the text is empty, it or the preface has a special token that cannot be plain text, or a name or
                value is not plain data.
            UnknownFieldError: a field has no placeholder in the text.
            ContextOverflowError: it is longer than the model's positions, the preface included.
            TemplateError: the chat template does not take a message of that role, or the preface.
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
        """Compile several texts in one forward, each behind those before it: its preface is all of them.

        Spliced in this order, behind the same preface and with the same text between them, all of them are exact. In another
        order, or some of them only, each is a skill that has read those before it in `texts`, the values in them included.

        Args:
            texts: name -> text, in order; `{field}` placeholders as in `compile`. What changes often is best in the last.
            values, fields: the fields' values, each for every text that has its placeholder.
            preface: what the first one reads, and so all of them; as in `compile`.
            between: text between two of them, which belongs to neither ("\\n\\n" in an `Agent`). A placeholder in
                it, or in the preface, is plain text.

        Raises:
            InvalidValueError, UnknownFieldError, ContextOverflowError, TemplateError: as `compile`; or there is no text.
        """
        return compute_drafts(model, Draft.together(model, texts, {**(values or {}), **fields}, preface, between))

    def check_fits(self, model: Model) -> None:
        """
        Raises:
            FingerprintMismatchError: another model, tokenizer or dtype compiled it.
        """
        check_fingerprint(self.name, self.fingerprint, model)


def compute_drafts(model: Model, drafts: Sequence[Draft]) -> list[Skill]:
    """Compute drafts, each behind the one before it, in one forward from position 0.

    Each one's account holds its own tokens and those between it and the one before: together they are what it all cost.
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
            f"skill {name!r} was compiled by a model with fingerprint {fingerprint[:8]}, and this one's is "
            f"{model.fingerprint[:8]} ('{model.name}'). Keys and values only fit the weights, tokenizer and dtype that made "
            "them: compile it again."
        )


def skills_among(fields: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, Skill]]:
    """The plain values and the skills among a message's keyword arguments."""
    skills = {name: value for name, value in fields.items() if isinstance(value, Skill)}
    return {name: value for name, value in fields.items() if name not in skills}, skills


def types_in(skills: Iterable[Skill]) -> dict[str, FieldType]:
    """The types of the fields in some skills."""
    return {name: kind for skill in skills for name, kind in skill.types.items()}
