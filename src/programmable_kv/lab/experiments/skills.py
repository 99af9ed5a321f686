"""A context of several skills, token by token: a prefix, policies one after another, a question about one of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, takewhile

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.span import Span
from programmable_kv.engine import Rows
from programmable_kv.lab.composing.frame import other_lines
from programmable_kv.lab.experiments.cases import Case, cases
from programmable_kv.lab.experiments.pair import Pair, first_tokens
from programmable_kv.lab.experiments.prevention import tail_of
from programmable_kv.lab.experiments.written import Part, Written, written
from programmable_kv.lab.tools.kv import moved_rows
from programmable_kv.models.load import Model

OTHERS_SEED = 96_000
"""Seed of the policies next to the one that is asked about."""
LINES = 6
"""Lines about other things before the skills."""
PREFACE_LINES = 3


@dataclass(frozen=True, slots=True)
class Skills:
    """The tokens up to the row that decides, and where the skills lie."""

    ids: tuple[int, ...]
    chunks: tuple[Span, ...]
    asked: int
    """Index of the chunk that the question is about."""
    actions: tuple[tuple[int, ...], ...]
    """Slots of the actions in each chunk's rules."""
    preface: tuple[int, ...]
    """Tokens that a skill may be compiled behind: like the prefix, with other lines."""

    @property
    def prefix(self) -> int:
        return self.chunks[0].start

    @property
    def tail(self) -> int:
        """The first slot after the skills."""
        return self.chunks[-1].stop

    @property
    def last(self) -> int:
        return len(self.ids) - 1

    @property
    def own(self) -> Span:
        return self.chunks[self.asked]

    def together(self) -> PartReads:
        """Which parts read which if each skill reads itself and those before it, as if all were compiled together."""
        table = torch.ones(len(self.chunks) + 2, len(self.chunks) + 2, dtype=torch.bool).tril()
        table[1:, 0] = False
        count = len(self.chunks)
        part_of = torch.zeros(len(self.ids), dtype=torch.long)
        for number, chunk in enumerate(self.chunks, start=1):
            part_of[chunk.start : chunk.stop] = number
        part_of[self.tail :] = count + 1
        return PartReads(part_of, table)


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy as a skill: a heading that says what it is about, then facts and rules."""

    ids: tuple[int, ...]
    actions: tuple[int, ...]
    """Which of its tokens are actions in rules."""


def chunk_of(text: Written) -> Span:
    """The span of a policy's facts and rules, without the first paragraph, which says whose policy it is."""
    begins = "".join(text.tokens).index("\n\n") + 2
    starts = accumulate((len(token) for token in text.tokens), initial=0)
    return Span(next(slot for slot, start in enumerate(starts) if start >= begins), tail_of(text)[0])


def policy_of(model: Model, case: Case, text: Written) -> Policy:
    """A case's policy as a skill, with a text's values."""
    chunk = chunk_of(text)
    heading: list[int] = model.tokenizer.encode(f"For {case.gate.topic}:\n", add_special_tokens=False)
    offset = len(heading) - chunk.start
    actions = tuple(slot + offset for slot in chunk.range if text.parts[slot] is Part.ACTION)
    return Policy((*heading, *text.ids[chunk.start : chunk.stop]), actions)


def layout(pair: Pair, others: Sequence[Policy], *, shift: int = 0) -> Skills:
    """The pair's policy among others, with the old value, in a random order.

    Args:
        shift: chooses the lines of the prefix, except the last. The prefix has as many tokens with any of them.
    """
    text, own = pair.text, chunk_of(pair.text)
    rng = random.Random(f"{OTHERS_SEED}/order/{pair.case.number}")
    order = rng.sample(range(len(others) + 1), len(others) + 1)
    policies = [policy_of(pair.model, pair.case, text), *others]
    # The line before the skill is the same for every shift, so that it does not begin in the middle of a sentence.
    room, near = len(_lines(pair, 0, LINES - 1)), _lines(pair, LINES - 1, 1)
    ids = [*text.ids[: own.start], *_lines(pair, shift, 4 * LINES)[:room], *near]
    chunks, actions = [], []
    for which in order:
        policy = policies[which]
        chunks.append(Span(len(ids), len(ids) + len(policy.ids)))
        actions.append(tuple(slot + len(ids) for slot in policy.actions))
        ids += policy.ids
    ids += text.ids[own.stop :]
    preface = (*text.ids[: own.start], *_lines(pair, 3 * LINES, PREFACE_LINES))
    return Skills(tuple(ids), tuple(chunks), order.index(0), tuple(actions), preface[: chunks[0].start])


def _lines(pair: Pair, first: int, count: int) -> list[int]:
    lines = other_lines()
    said = "".join(f"{lines[number % len(lines)]}\n" for number in range(first, first + count))
    ids: list[int] = pair.model.tokenizer.encode(said, add_special_tokens=False)
    return ids


def beside(pair: Pair, count: int) -> tuple[list[Policy], dict[str, int]] | None:
    """Policies of other domains, and the first token of every action; None if too few drawn ones differ in these."""
    drawn = cases(pair.case.number + 8, OTHERS_SEED)[pair.case.number :]
    found: list[Policy] = []
    tokens = dict(pair.first_tokens)
    domains = {pair.case.domain}
    for case in drawn:
        text = _of(pair, case)
        firsts = first_tokens(pair.model, case, text)
        taken = set(tokens.values())
        if case.domain in domains or firsts is None or taken & set(firsts.values()) or set(firsts) & set(tokens):
            continue
        found.append(policy_of(pair.model, case, text))
        tokens |= firsts
        domains.add(case.domain)
        if len(found) == count:
            return found, tokens
    return None


def _of(pair: Pair, case: Case) -> Written:
    change = case.changes[0]
    return written(pair.model, case, change, case.values(change[0]))


class Contexts:
    """A policy's skills in one context or another.

    The tokens that a text shares with an earlier one, from the first on, are computed once: their rows depend only on
    the tokens before them.
    """

    def __init__(self, pair: Pair) -> None:
        self._engine = pair.engine
        self._known: dict[tuple[int, ...], KVBuffer] = {pair.old_text.ids[:-1]: pair.old}
        """Prefilled texts, by their tokens."""

    def full(self, skills: Skills, stop: int | None = None) -> KVBuffer:
        """A buffer with the tokens up to `stop` (None: all but the last), in which every token reads all before it."""
        return self._prefilled(skills.ids[: skills.last if stop is None else stop]).fork()

    def alone(self, full: KVBuffer, skills: Skills) -> KVBuffer:
        """A copy of a full prefill in which each skill is computed alone. What follows the skills is unchanged."""
        buffer = full.fork()
        for chunk in skills.chunks:
            self.put(buffer, skills, chunk, ())
        return buffer

    def together(self, alone: KVBuffer, skills: Skills) -> KVBuffer:
        """A copy of skills that were computed alone, in which each reads those before it. The first is unchanged."""
        buffer, slots = alone.fork(), tuple(range(skills.chunks[0].stop, skills.tail))
        rows = Rows(tuple(skills.ids[slot] for slot in slots), slots, slots)
        self._engine.compute(buffer, rows, logits=0, reads=skills.together())
        return buffer

    def put(self, buffer: KVBuffer, skills: Skills, chunk: Span, preface: Sequence[int]) -> None:
        """Put a skill into its place as computed behind a preface, with its keys rotated to that place.

        Of a preface longer than the prefix, only the last tokens are used.
        """
        preface = tuple(preface)[-skills.prefix :]
        source = self._prefilled((*preface, *skills.ids[chunk.start : chunk.stop]))
        slots = list(range(len(preface), source.length))
        buffer.overwrite(list(chunk.range), moved_rows(self._engine, source, slots, buffer, list(chunk.range)))

    def _prefilled(self, ids: tuple[int, ...]) -> KVBuffer:
        """A buffer with these tokens, in which every token reads all before it. Callers fork it and never change it."""
        if ids not in self._known:
            nearest = max(self._known, key=lambda known: _in_common(known, ids))
            same = _in_common(nearest, ids)
            buffer = self._known[nearest].fork() if same else self._engine.new_buffer(len(ids))
            buffer.truncate(same)
            self._engine.append(buffer, ids[same:], logits=0)
            self._known[ids] = buffer
        return self._known[ids]


def _in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of equal tokens from the start, without the last of `second`, so that one is left to compute."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second[:-1], strict=False)))


def repaired_rows(skills: Skills, chosen: Sequence[Sequence[int]]) -> Rows:
    """The rows of some tokens of each chunk and of all that follows the chunks. They read everything before them."""
    slots = tuple(sorted({*chain.from_iterable(chosen), *range(skills.tail, len(skills.ids))}))
    return Rows(tuple(skills.ids[slot] for slot in slots), slots, slots)
