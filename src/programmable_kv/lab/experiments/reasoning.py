"""Why does a thought repair an edit in place? Blocks what the thought and the decision read, one by one and together.

Two caches have the policy and a question that asks for a line of thought. One was prefilled with the old value and
edited in place, so that the field is new and all notes are stale; the other was prefilled with the new value. On each,
the model writes its thought while the thought's rows cannot read some tokens; then it decides while the deciding row
cannot read some tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import at, mean_by_domain, share
from programmable_kv.lab.experiments.written import RULES, TAIL, Written, written
from programmable_kv.lab.tools.branches import Branch, Grown, branching
from programmable_kv.notebook.asking import THOUGHT_ENDS, THOUGHT_LIMIT, stop_ids
from programmable_kv.notebook.decision import option_ids
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.wording import THINK_INSTRUCTION

NOTHING = "nothing"
THOUGHT = "thought"
"""Set of the thought's own rows, which the decision can be kept from reading."""
AS_THOUGHT = "random_as_thought"
BLIND_THOUGHTS = (NOTHING, "field", "rules", "random_as_field", "random_as_rules")
"""Sets that the thought's rows cannot read."""
BLIND_DECISIONS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    NOTHING: (
        (), ("field",), ("rules",), (THOUGHT,), ("field", THOUGHT),
        ("random_as_field",), ("random_as_rules",), (AS_THOUGHT,),
    ),
    "field": ((), ("field",), (THOUGHT,)),
    "rules": ((),),
    "random_as_field": ((),),
    "random_as_rules": ((),),
}  # fmt: skip
"""For each of these, the sets that the deciding row cannot read."""


Rules = Mapping[str, Callable[[Sequence[int]], Collection[int]]]


@dataclass(slots=True)
class _Thought:
    """A thought that is being written."""

    blind: frozenset[int]
    known: list[int]
    """Tokens to compute next."""
    drawn: list[int] = field(default_factory=list)
    """Its tokens, without the opening's."""
    slots: tuple[int, ...] = ()
    """Slots of the computed rows, including the opening's."""
    text: str = ""
    ended: bool = False

    def branch(self, buffer: KVBuffer, used: int, first: int, rest: Sequence[int]) -> Branch:
        """Its next tokens and those guessed after them. It sees its own slots and the context's, but no blind ones."""
        at = first + len(self.slots)
        others = set(range(used, buffer.length)) - set(self.slots)
        ids = (*self.known, *rest)
        return Branch(ids, tuple(range(at, at + len(ids))), absent=tuple(sorted(self.blind | others)))


@dataclass(slots=True)
class Thinking:
    """A cached policy and question on which thoughts are written and decisions made, any number of times."""

    notebook: Notebook
    opening: Sequence[int]
    """Tokens that open the answer."""
    options: Sequence[str]
    drawn: list[list[int]] = field(default_factory=list)
    """Earlier thoughts, as guesses for new ones."""

    def decided(self, blind_thought: Collection[int], decisions: Rules) -> tuple[str, dict[str, dict[str, float]]]:
        """The thought, and the score of each option's first token under each decision's rule. The cache is unchanged.

        Args:
            blind_thought: slots that the opening's and the thought's rows cannot read.
            decisions: name -> function from the thought's slots to the slots that the deciding row cannot read.
        """
        return self.decided_each([(blind_thought, decisions)])[0]

    def decided_each(
        self, arms: Sequence[tuple[Collection[int], Rules]]
    ) -> list[tuple[str, dict[str, dict[str, float]]]]:
        """`decided` for several pairs of its arguments. Their thoughts are written side by side."""
        engine, buffer = self.notebook.model.engine, self.notebook.cache
        used, first = buffer.length, buffer.next_position
        with branching(engine, buffer) as branches:
            thoughts = [_Thought(frozenset(blind), list(self.opening)) for blind, _ in arms]
            while open_ones := [each for each in thoughts if not each.ended]:
                asked = [(each, self._guess(each.drawn)) for each in open_ones]
                grown = branches.grown([each.branch(buffer, used, first, rest) for each, rest in asked])
                for (each, rest), found in zip(asked, grown, strict=True):
                    self._go_on(each, rest, found)
            for each in thoughts:
                self._close(each)
            # The deciding row is the last token's. All rows before it are computed, and it is computed under each rule.
            behind = [each for each in thoughts if each.known]
            if behind:
                grown = branches.grown([each.branch(buffer, used, first, ()) for each in behind], every=False)
                for each, found in zip(behind, grown, strict=True):
                    each.slots += found.slots
            copies = []
            for each, (_, rules) in zip(thoughts, arms, strict=True):
                own = each.slots[: len(self.opening) + len(each.drawn) - 1]
                absent = tuple(sorted(set(range(used, buffer.length)) - set(own)))
                at = first + len(self.opening) + len(each.drawn) - 1
                for rule in rules.values():
                    unread = tuple(sorted(rule(own[len(self.opening) :])))
                    copies.append(Branch((each.drawn[-1],), (at,), unread=unread, absent=absent))
            logits = iter(torch.log_softmax(branches.last(copies).cpu().double(), dim=-1))
        result = []
        for each, (_, rules) in zip(thoughts, arms, strict=True):
            tokens = option_ids(self.notebook.model.tokenizer, each.text, self.options, None)
            scores = {}
            for name in rules:
                row = next(logits)
                scores[name] = {option: float(row[ids[0]]) for option, ids in zip(self.options, tokens, strict=True)}
            result.append((each.text, scores))
        return result

    def _guess(self, drawn: list[int]) -> list[int]:
        """The rest of an earlier thought that begins like this one."""
        return next((each[len(drawn) :] for each in self.drawn if each[: len(drawn)] == drawn), [])

    def _go_on(self, thought: _Thought, rest: Sequence[int], found: Grown) -> None:
        """Add greedy tokens up to the words that announce the decision. A guess counts as far as it is greedy."""
        tokenizer = self.notebook.model.tokenizer
        wanted = found.logits[-len(rest) - 1 :].argmax(dim=-1).tolist()
        kept = next((n for n, token in enumerate(rest) if token != wanted[n]), len(rest))
        thought.slots += found.slots[: len(thought.known) + kept]
        thought.drawn += rest[:kept]
        thought.known = []
        thought.text = tokenizer.decode(thought.drawn, skip_special_tokens=True)
        if (
            len(thought.drawn) >= THOUGHT_LIMIT
            or thought.text.endswith(THOUGHT_ENDS)
            or wanted[kept] in stop_ids(self.notebook)
        ):
            thought.ended = True
            return
        thought.known = [wanted[kept]]
        thought.drawn += thought.known
        thought.text = tokenizer.decode(thought.drawn, skip_special_tokens=True)
        thought.ended = thought.text.endswith(THOUGHT_ENDS) or len(thought.drawn) >= THOUGHT_LIMIT

    def _close(self, thought: _Thought) -> None:
        """Close a thought that ends otherwise with the words that announce the decision."""
        if thought.drawn not in self.drawn:
            self.drawn.insert(0, list(thought.drawn))
        if not thought.text.endswith(THOUGHT_ENDS):
            closing = self.notebook.model.tokenizer.encode(THOUGHT_ENDS, add_special_tokens=False)
            thought.known += closing
            thought.drawn += closing
            thought.text += THOUGHT_ENDS
        thought.known = thought.known[:-1]


def measure(pair: Pair, _: Sequence[Row], *, blinded_from: Sequence[str] = BLIND_THOUGHTS) -> Row:
    """The decision on each cache, by what the thought and the deciding row could not read."""
    case = replace(pair.case, asked=f"{pair.case.asked} {THINK_INSTRUCTION}")
    text = written(pair.model, case, pair.change, case.values(pair.change[0]))
    sets = blocked(text, pair.case.number)
    row: Row = {"right": list(pair.actions), "tokens": {name: len(slots) for name, slots in sets.items()}}
    # Most thoughts have this form. The guess is checked, so it finds the same greedy tokens, only sooner.
    drawn = [
        pair.model.tokenizer.encode(f"{case.gate.field} is {value}{THOUGHT_ENDS}", add_special_tokens=False)
        for value in (pair.change[1], pair.change[0])
    ]
    for name, edited in (("in_place", True), ("fresh", False)):
        notebook = Notebook(pair.model)
        notebook.message("system", case.scenario.prompt, **case.values(pair.change[0 if edited else 1]))
        notebook.message("user", case.asked).prefill()
        if edited:
            notebook.edit({case.gate.field: pair.change[1]}, mode=Mode.IN_PLACE)
        thinking = Thinking(notebook, text.ids[len(notebook) :], list(pair.first_tokens), drawn)
        row[name] = _under(pair, thinking, blinded_from, sets)
    return row


def blocked(text: Written, number: int) -> dict[str, tuple[int, ...]]:
    """The slots of each set.

    Random sets are from the policy's other lines: as many slots as the field has, and as the rules have, or all if they
    are fewer.
    """
    first, rules = min(text.of(*TAIL)), text.of(*RULES)
    others = [slot for slot in text.later if slot < first and slot not in rules]
    rng = random.Random(f"{SEED}/reasoning/{number}")
    own = {"field": tuple(text.field.range), "rules": rules}
    drawn = {
        f"random_as_{name}": tuple(sorted(rng.sample(others, min(len(slots), len(others)))))
        for name, slots in own.items()
    }
    # A thought is compared with the first of these, as many as it has rows.
    return {**own, **drawn, AS_THOUGHT: tuple(rng.sample(others, len(others)))}


def _under(
    pair: Pair, thinking: Thinking, blinded_from: Sequence[str], sets: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    """The decisions after thoughts that could not read one set each."""

    def unread(names: Sequence[str], thought: Sequence[int]) -> Collection[int]:
        found = {**sets, THOUGHT: tuple(thought), AS_THOUGHT: sets[AS_THOUGHT][: len(thought)]}
        return {slot for name in names for slot in found[name]}

    arms = [
        (sets.get(which, ()), {"+".join(names) or NOTHING: partial(unread, names) for names in BLIND_DECISIONS[which]})
        for which in blinded_from
    ]
    new, old = (pair.change[1], pair.change[0])
    return {
        which: {
            "thought": text,
            "says": "new" if new in text else "old" if old in text else "neither",
            "decided": {name: _outcome(pair, each) for name, each in scores.items()},
        }
        for which, (text, scores) in zip(blinded_from, thinking.decided_each(arms), strict=True)
    }


def _outcome(pair: Pair, scores: Mapping[str, float]) -> dict[str, Any]:
    old, new = pair.actions
    return {"choice": max(scores, key=lambda action: scores[action]), "gap": round(scores[new] - scores[old], 4)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """How often each arm is right, over the policies that a thought on the fresh cache gets right; what they say."""
    right = [row for row in rows if _right("fresh", NOTHING, NOTHING, row)]
    summary: dict[str, Any] = {
        "thought_right": share(rows, partial(_right, "fresh", NOTHING, NOTHING)),
        "thought": len(right),
    }
    for cache in ("in_place", "fresh"):
        part = summary[cache] = {}
        for which in right[0][cache] if right else BLIND_THOUGHTS:
            says = {each: share(right, partial(_says, cache, which, each)) for each in ("new", "old")}
            part[which] = {"says": says} | {
                name: {
                    "right": share(right, partial(_right, cache, which, name)),
                    "old": share(right, partial(_old, cache, which, name)),
                    "gap": mean_by_domain(right, at(f"{cache}.{which}.decided.{name}.gap")),
                }
                for name in ("+".join(names) or NOTHING for names in BLIND_DECISIONS[which])
            }
    return summary


def _chosen(cache: str, which: str, name: str, row: Row) -> str:
    return str(row[cache][which]["decided"][name]["choice"])


def _right(cache: str, which: str, name: str, row: Row) -> bool:
    return bool(_chosen(cache, which, name, row) == row["right"][1])


def _old(cache: str, which: str, name: str, row: Row) -> bool:
    return bool(_chosen(cache, which, name, row) == row["right"][0])


def _says(cache: str, which: str, value: str, row: Row) -> bool:
    return bool(row[cache][which]["says"] == value)


REASONING = Experiment(
    name="reasoning",
    version=1,
    title="Why a thought repairs an edit in place: what thought and decision read, blocked one by one",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    seconds=2.0,
    quick=partial(measure, blinded_from=(NOTHING, "field")),
)
