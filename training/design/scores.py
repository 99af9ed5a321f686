"""Scores of held-out answers, token by token, in every arm. Arms of one kind have the same cases.

An answer is right if each of its tokens is the most likely one after the tokens before it, so greedy decoding would
write it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from programmable_kv.scenarios.vocabulary import Domain, held_out_domains
from training.design.batches import Batch, batches, predicted
from training.design.blocks import Blocks, held_out_facts, held_out_rule_sets, held_out_updates, write
from training.design.dialogues import Dialogue, held_out_dialogue, rewritten, under_design, with_errata
from training.design.mixture import plain
from training.design.parts import Encoding, TokenSequence
from training.design.tools import held_out_tools

_SEED = 77_000
_AT_ONCE = 64
_WAYS: dict[str, Callable[[Dialogue, Encoding], TokenSequence]] = {
    "in place": under_design, "errata, causal": with_errata, "full prefill, causal": rewritten,
}  # fmt: skip
_POLICIES: dict[str, tuple[int, bool | None]] = {
    "one set": (1, False), "two hops": (1, True), "two sets": (2, None),
}  # fmt: skip
_BLOCKS: dict[str, Callable[[random.Random, int], Blocks]] = {
    **{f"{count} rule sets": lambda rng, number, count=count: _sets(rng, number, count) for count in (1, 2, 3, 6)},  # type: ignore[misc]
    "16 tools": lambda rng, number: held_out_tools(rng, 16),
    "facts": lambda rng, number: held_out_facts(rng, _domain(number)),
    "updates": lambda rng, number: held_out_updates(rng, _domain(number)),
}
_CONVERSATIONS = "conversations"
ARMS = (
    *(f"{kind}: {way}" for kind in _POLICIES for way in _WAYS),
    *(f"{kind}: {way}" for kind in _BLOCKS for way in ("alone", "in one")),
    _CONVERSATIONS,
)


def case(arm: str, number: int, encoding: Encoding) -> TokenSequence:
    """Draw a held-out sequence of an arm. Only its last answer is marked as learned, which means scored."""
    kind, _, way = arm.partition(": ")
    rng = random.Random(f"{_SEED}/{kind}/{number}")
    if kind in _POLICIES:
        gates, two_hop = _POLICIES[kind]
        dialogue = held_out_dialogue(rng, _domain(number), gates=gates, two_hop=two_hop)
        return _WAYS[way](dialogue, encoding).last_answer_only()
    if kind in _BLOCKS:
        return write(_BLOCKS[kind](rng, number), encoding, kind, alone=way == "alone").last_answer_only()
    return plain(rng, encoding, held_out=True).last_answer_only()


def _domain(number: int) -> Domain:
    domains = held_out_domains()
    return domains[number % len(domains)]


def _sets(rng: random.Random, number: int, count: int) -> Blocks:
    first = _domain(number)
    others = [
        domain for domain in held_out_domains() if domain is not first and not set(domain.topics) & set(first.topics)
    ]
    return held_out_rule_sets(rng, [first, *rng.sample(others, count - 1)])


@dataclass(frozen=True, slots=True)
class CaseMaker:
    """Makes the cases of all arms, in chunks of a few dozen."""

    encoding: Encoding
    count: int
    tokens_per_pass: int

    @property
    def chunks(self) -> int:
        return len(ARMS) * self._per_arm

    @property
    def _per_arm(self) -> int:
        return -(-self.count // _AT_ONCE)

    def __call__(self, chunk: int) -> tuple[str, tuple[Batch, ...]]:
        arm, first = ARMS[chunk // self._per_arm], chunk % self._per_arm * _AT_ONCE
        numbers = range(first, min(self.count, first + _AT_ONCE))
        return arm, tuple(batches([case(arm, number, self.encoding) for number in numbers], self.tokens_per_pass))


@torch.no_grad()
def scores(model: Any, made: Iterable[tuple[str, tuple[Batch, ...]]]) -> dict[str, dict[str, int]]:
    """Return arm -> how many answers are right, and of how many."""
    model.eval()
    found = {arm: {"right": 0, "n": 0} for arm in ARMS}
    for arm, together in made:
        for batch in together:
            said = predicted(model, batch)
            wrong = torch.zeros(len(batch.ids), dtype=torch.long, device=said.row.device)
            wrong.index_add_(0, said.row, (~said.right).long())
            found[arm]["right"] += int((wrong == 0).sum())
            found[arm]["n"] += len(batch.ids)
    model.train()
    return found


def table(**columns: dict[str, dict[str, int]]) -> str:
    """Return a text table with one column for each set of scores."""
    lines = [f"{'answers right':32}" + "".join(f"{name:>10}" for name in columns)]
    for arm in ARMS:
        shares = (column[arm]["right"] / max(1, column[arm]["n"]) for column in columns.values())
        lines.append(f"{arm:32}" + "".join(f"{share:10.3f}" for share in shares))
    return "\n".join(lines)
