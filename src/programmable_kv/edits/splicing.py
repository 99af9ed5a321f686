"""Putting a compiled skill into a cached context: the splice, and the repair of its seam.

A skill was compiled with nothing before it, or behind a preface that is not here. Spliced, its keys are rotated to where
they stand now; its first tokens, which would have read most from what precedes them (and served as the attention sink of
the lone text), may be computed again in their place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidEditError
from programmable_kv.ledger.context import Context, FieldState
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import TokenState
from programmable_kv.skills.skill import Skill

SKILL_MARK = "\ue003"
"""stands for a skill in a text until its tokens are spliced in"""
DEFAULT_SEAM = 4
_SPELLED = re.compile(r"(deviation):(\d+(?:\.\d+)?)%|(influence):(\d+)")


@dataclass(frozen=True, slots=True)
class SeamRepair:
    """Which of a spliced skill's tokens are computed again in their place.

    The first `seam`; and those that `rule` picks: `"deviation:15%"` the share whose keys differ most from what they would
    be in place (CacheBlend's rule, arXiv 2405.16444, section 4; finding out computes the whole skill once, which the
    account counts), `"influence:8"` the tokens that its own last one attends to most.
    """

    seam: int = DEFAULT_SEAM
    rule: str | None = None

    def __post_init__(self) -> None:
        if self.seam < 0:
            raise InvalidEditError(f"a seam has at least 0 tokens, got {self.seam}")
        if self.rule is not None and not _SPELLED.fullmatch(self.rule):
            raise InvalidEditError(
                f"there is no repair {self.rule!r}; write for example 'deviation:15%' or 'influence:8'"
            )

    @property
    def computes(self) -> bool:
        """Whether anything is computed again at all."""
        return self.seam > 0 or self.rule is not None

    def rows(self, engine: Engine, buffer: KVBuffer, ids: tuple[int, ...], span: Span) -> Rows:
        """What to compute again of a skill that was just spliced into `span`, of these tokens. The buffer is left as it was."""
        chosen = set(range(span.start, min(span.stop, span.start + self.seam)))
        match = _SPELLED.fullmatch(self.rule) if self.rule else None
        if match and match[1]:
            count = round(len(span) * float(match[2]) / 100)
            chosen |= _top(_deviations(engine, buffer, ids, span), count, span)
        elif match:
            last = span.stop - 1
            reader = Rows((ids[-1],), (last,), (int(buffer.positions[last]),))
            chosen |= _top(engine.attention_of(buffer, reader)[span.start : span.stop].cpu(), int(match[4]), span)
        return _in_place(buffer, ids, span.start, sorted(chosen))


def _top(scores: torch.Tensor, count: int, span: Span) -> set[int]:
    return {span.start + token for token in scores.topk(min(count, len(span))).indices.tolist()}


def _deviations(engine: Engine, buffer: KVBuffer, ids: tuple[int, ...], span: Span) -> torch.Tensor:
    """[n] how far each token's cached keys are from those computed in place, relative, over all layers.

    With MLA the keys are made from the latent, and it is the latents that are compared.
    """
    slots = slice(span.start, span.stop)
    cached = [buffer.keys(layer)[:, :, slots].clone() for layer in range(len(buffer))]
    mark = buffer.mark()
    engine.compute(buffer, _in_place(buffer, ids, span.start, span.range), logits=0)
    deviations = torch.zeros(len(span), dtype=torch.float64)
    for layer, keys in enumerate(cached):
        true = buffer.keys(layer)[:, :, slots]
        off, size = (tensor.cpu().double().pow(2).sum(dim=(0, 1, 3)) for tensor in (true - keys, true))
        deviations += off / size
    buffer.rollback(mark)
    return deviations


def _in_place(buffer: KVBuffer, ids: tuple[int, ...], start: int, slots: Sequence[int]) -> Rows:
    """Rows for some slots of a skill that starts at slot `start`, where they stand."""
    positions = tuple(int(buffer.positions[slot]) for slot in slots)
    return Rows(tuple(ids[slot - start] for slot in slots), tuple(slots), positions)


@dataclass(frozen=True, slots=True)
class Spliced:
    """A splice that was carried out: the logits asked for, and what it did beyond the asked."""

    logits: torch.Tensor | None
    note: str


def splice(
    engine: Engine,
    buffer: KVBuffer,
    context: Context,
    skill: Skill,
    where: Span,
    repair: SeamRepair,
    then: Sequence[int] = (),
) -> Spliced:
    """Put a skill in the place of the slots `where` (which may be none), in the cache and in the books.

    What follows is relocated and marked stale: it was computed without the skill. The tokens `then` are computed after
    the end, in one forward with the seam; the logits are of the last of them. `context` is changed, and does not hold them.

    Raises:
        UnverifiedError: keys of this model cannot be moved, or its rows not computed again in their place.
        InvalidEditError: an end of `where` is no place in the text, or a field of the skill has another value here, or
            two (one that is written, and one that an erratum states).
    """
    _check_written(context, skill)
    at = where.start
    exact = _is_exact_at(context, skill, at)
    if not exact and repair.computes:
        engine.require_rows(instead="Splice with SeamRepair(0), which computes nothing again.")
    compiled_at = int(skill.segment.computed_at[-1]) + 1
    reach = max(buffer.next_position, buffer.length - len(where) + len(skill) + len(then), compiled_at)
    layout = engine.require_relocation(below=reach)
    appended = at == len(context)
    index = context.split_at(at)
    del context.units[index : context.split_at(where.stop)]
    if not appended:  # at a prompt's prefill, the text that holds a field may be still to come
        context.forget_lost_fields()
        context.mark_stale(index)
    fields = joined_values({name: state.current for name, state in context.fields.items()}, skill)
    following = len(context) - at
    buffer.insert(at, skill.segment, layout, replacing=len(where))
    rows = Rows() if exact else repair.rows(engine, buffer, skill.unit.ids, Span(at, at + len(skill)))
    _enter(context, index, skill, fields, exact)
    context.note_computed(rows.slots, repaired=True)
    rows = rows.then(Rows.appended(then, buffer.length, buffer.next_position))
    logits = engine.compute(buffer, rows, logits=1 if then else 0) if rows.slots else None
    note = f"{following} later tokens were relocated and have not read {skill.name}" if following else ""
    return Spliced(logits if then else None, note)


def _enter(context: Context, index: int, skill: Skill, fields: Mapping[str, str], exact: bool) -> None:
    """Write a skill into the books, as the context's unit of that index, with the values that it was computed under.

    The units beside it were computed under no value of its own fields, nor it, unless exact, of theirs. `fields` are all
    that are in force, the skill's included. What a preface may have said of one is not known: such a unit is `foreign`.
    """
    unread: frozenset[str | None] = frozenset()
    for other, known in enumerate(context.units):
        context.units[other] = replace(known, read={**dict.fromkeys(fields, unread), **known.read})
    read = dict.fromkeys(fields, unread)
    if exact:
        read.update(context.reading(sum(map(len, context.units[:index]))))
    read |= {name: frozenset[str | None]({value}) for name, value in skill.values.items()}
    unit = skill.unit if exact else skill.unit.marked(Span(0, len(skill)), TokenState.RELOCATED)
    context.units.insert(index, replace(unit, name=skill.name, read=read, foreign=not exact and bool(skill.preface)))
    for name, value in fields.items():
        context.fields.setdefault(name, FieldState(value, value))


def _check_written(context: Context, skill: Skill) -> None:
    """
    Raises:
        InvalidEditError: a field of the skill is written with another value than it has.
    """
    for name in skill.values:
        state = context.fields.get(name)
        if state is not None and state.written != state.current:
            raise InvalidEditError(
                f"{name} is {state.current!r}, and its place still says {state.written!r}, so a skill that holds it cannot "
                "be spliced in. Edit the field in a mode that writes it (in_place, field_erratum, suffix) first."
            )


def _is_exact_at(context: Context, skill: Skill, at: int) -> bool:
    """Whether what precedes slot `at` is, token for token and exactly, what the skill read while it was compiled."""
    return (
        not skill.rounded
        and len(skill.preface_ids) == at
        and tuple(context.ids[:at]) == skill.preface_ids
        and context.computed_base(at) is TokenState.EXACT
        and all(None not in seen for seen in context.reading(at).values())
    )


def joined_values(values: Mapping[str, str], skill: Skill) -> dict[str, str]:
    """The fields' values with those of a skill.

    Raises:
        InvalidEditError: a field of the skill has another value already.
    """
    for name, value in skill.values.items():
        if values.get(name, value) != value:
            raise InvalidEditError(
                f"skill {skill.name!r} was compiled with {name} = {value!r}, and the context has {values[name]!r}. Compile "
                "it with that value, or splice it before the edit."
            )
    return {**values, **skill.values}


def cut_at_skills(rendered: Rendered, skills: Mapping[str, Skill]) -> list[Rendered | Skill]:
    """A rendered text in pieces: the text between skills, and the skills in their places."""
    pieces: list[Rendered | Skill] = []
    start = 0
    fields = [(name, span) for name, span in rendered.places if name not in skills]
    end = Span(len(rendered.text), len(rendered.text))
    for name, span in [*((name, span) for name, span in rendered.places if name in skills), ("", end)]:
        inside = tuple((field, s.shifted(-start)) for field, s in fields if start <= s.start < span.start)
        if span.start > start:
            pieces.append(Rendered(rendered.text[start : span.start], inside))
        if name:
            pieces.append(skills[name])
        start = span.stop
    return pieces
