"""Why does a thought repair an edit in place? What the thought and the decision read is blocked, one by one and together.

Two caches hold the policy and a question that asks for a line of thought: one was prefilled with the old value and edited in
place, so that the field is new and all notes are stale; the other was prefilled with the new value. On each the model writes
its thought, while the rows of the thought cannot read some tokens; then it decides, while the row that decides cannot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import at, mean_by_domain, share
from programmable_kv.lab.experiments.written import RULES, TAIL, Written, written
from programmable_kv.lab.tools.knockout import blinded
from programmable_kv.lab.tools.together import Probe, probed
from programmable_kv.notebook.asking import THOUGHT_ENDS, THOUGHT_LIMIT, stop_ids
from programmable_kv.notebook.decision import option_ids
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.wording import THINK_INSTRUCTION

NOTHING = "nothing"
THOUGHT = "thought"
"""what the thought's own rows hold: the decision can be kept from reading it"""
AS_THOUGHT = "random_as_thought"
BLIND_THOUGHTS = (NOTHING, "field", "rules", "random_as_field", "random_as_rules")
"""what the thought's rows cannot read"""
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
"""what the row that decides cannot read, for each of them"""


@dataclass(slots=True)
class Thinking:
    """A cached policy and question, on which a thought is written and a decision made, again and again."""

    notebook: Notebook
    opening: Sequence[int]
    """the tokens that open the answer"""
    options: Sequence[str]
    drawn: list[list[int]] = field(default_factory=list)
    """earlier thoughts, which a new one may begin like"""

    def decided(
        self, blind_thought: Collection[int], decisions: Mapping[str, Callable[[Sequence[int]], Collection[int]]]
    ) -> tuple[str, dict[str, dict[str, float]]]:
        """The thought, and under each decision's rule the score of each option's first token. The cache is unchanged.

        Args:
            blind_thought: slots that the opening's and the thought's rows cannot read.
            decisions: by name, from the thought's slots the slots that the deciding row cannot read.
        """
        engine, buffer = self.notebook.model.engine, self.notebook.cache
        with blinded(engine, buffer, lambda _: blind_thought):
            start = buffer.length + len(self.opening)
            ids, text = self._thought()
            tokens = option_ids(self.notebook.model.tokenizer, text, self.options, None)
            buffer.truncate(start + len(ids) - 1)
            slots = range(start, buffer.length)
            # The masks of the copies of this row are made anew: they do not share what the thought's rows cannot read.
            probes = [Probe(blocked=tuple(sorted(rule(slots)))) for rule in decisions.values()]
            found = torch.log_softmax(probed(engine, buffer, ids[-1], probes).cpu().double(), dim=-1)
        scores = {
            name: {option: float(row[each[0]]) for option, each in zip(self.options, tokens, strict=True)}
            for name, row in zip(decisions, found, strict=True)
        }
        return text, scores

    def _thought(self) -> tuple[list[int], str]:
        """Greedy tokens up to the words that announce the decision, which close a thought that ends otherwise.

        They are appended behind the opening. Thoughts of one cache are much alike, so an earlier one is guessed and checked in
        one forward: the same greedy tokens, sooner.
        """
        engine, buffer, tokenizer = self.notebook.model.engine, self.notebook.cache, self.notebook.model.tokenizer
        drawn: list[int] = []
        known, text = list(self.opening), ""
        while True:
            rest = next((each[len(drawn) :] for each in self.drawn if each[: len(drawn)] == drawn), [])
            before = buffer.length
            logits = engine.append(buffer, [*known, *rest], logits=len(rest) + 1)
            wanted = logits.argmax(dim=-1).tolist()
            kept = next((n for n, token in enumerate(rest) if token != wanted[n]), len(rest))
            buffer.truncate(before + len(known) + kept)
            drawn += rest[:kept]
            text = tokenizer.decode(drawn, skip_special_tokens=True)
            ended = (
                len(drawn) >= THOUGHT_LIMIT or text.endswith(THOUGHT_ENDS) or wanted[kept] in stop_ids(self.notebook)
            )
            if ended:
                break
            known = [wanted[kept]]
            drawn += known
            text = tokenizer.decode(drawn, skip_special_tokens=True)
            if text.endswith(THOUGHT_ENDS) or len(drawn) >= THOUGHT_LIMIT:
                engine.append(buffer, known, logits=0)
                break
        if drawn not in self.drawn:
            self.drawn.insert(0, list(drawn))
        if not text.endswith(THOUGHT_ENDS):
            closing = tokenizer.encode(THOUGHT_ENDS, add_special_tokens=False)
            engine.append(buffer, closing, logits=0)
            drawn, text = [*drawn, *closing], text + THOUGHT_ENDS
        return drawn, text


def measure(pair: Pair, _: Sequence[Row], *, blinded_from: Sequence[str] = BLIND_THOUGHTS) -> Row:
    """On each cache, by what the thought could not read and the decision could not read: what was decided."""
    case = replace(pair.case, asked=f"{pair.case.asked} {THINK_INSTRUCTION}")
    text = written(pair.model, case, pair.change, case.values(pair.change[0]))
    sets = blocked(text, pair.case.number)
    row: Row = {"right": list(pair.actions), "tokens": {name: len(slots) for name, slots in sets.items()}}
    for name, edited in (("in_place", True), ("fresh", False)):
        notebook = Notebook(pair.model)
        notebook.message("system", case.scenario.prompt, **case.values(pair.change[0 if edited else 1]))
        notebook.message("user", case.asked).prefill()
        if edited:
            notebook.edit({case.gate.field: pair.change[1]}, mode=Mode.IN_PLACE)
        thinking = Thinking(notebook, text.ids[len(notebook) :], list(pair.first_tokens))
        row[name] = {which: _under(pair, thinking, which, sets) for which in blinded_from}
    return row


def blocked(text: Written, number: int) -> dict[str, tuple[int, ...]]:
    """The slots of each set. Random ones are of the policy's other lines: as many as the field has, and as the rules have, or
    all of them if they are fewer."""
    first, rules = min(text.of(*TAIL)), text.of(*RULES)
    others = [slot for slot in text.later if slot < first and slot not in rules]
    rng = random.Random(f"{SEED}/reasoning/{number}")
    own = {"field": tuple(text.field.range), "rules": rules}
    drawn = {
        f"random_as_{name}": tuple(sorted(rng.sample(others, min(len(slots), len(others)))))
        for name, slots in own.items()
    }
    # Of this order, the first as many as a thought turns out to have.
    return {**own, **drawn, AS_THOUGHT: tuple(rng.sample(others, len(others)))}


def _under(pair: Pair, thinking: Thinking, which: str, sets: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What is decided behind the thought that could not read one set."""

    def unread(names: Sequence[str], thought: Sequence[int]) -> Collection[int]:
        found = {**sets, THOUGHT: tuple(thought), AS_THOUGHT: sets[AS_THOUGHT][: len(thought)]}
        return {slot for name in names for slot in found[name]}

    rules = {"+".join(names) or NOTHING: partial(unread, names) for names in BLIND_DECISIONS[which]}
    text, scores = thinking.decided(sets.get(which, ()), rules)
    new, old = (pair.change[1], pair.change[0])
    return {
        "thought": text,
        "says": "new" if new in text else "old" if old in text else "neither",
        "decided": {name: _outcome(pair, each) for name, each in scores.items()},
    }


def _outcome(pair: Pair, scores: Mapping[str, float]) -> dict[str, Any]:
    old, new = pair.actions
    return {"choice": max(scores, key=lambda action: scores[action]), "gap": round(scores[new] - scores[old], 4)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """How often each arm is right, of the policies that a thought on the fresh cache decides rightly; and what thoughts say."""
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
    scenarios=160,
    seconds=9.6,
    quick=partial(measure, blinded_from=(NOTHING, "field")),
)
