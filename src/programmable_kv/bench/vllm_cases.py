"""The prompts of `vllm_splice.py`, and the answers of the library's own splice to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from programmable_kv import Notebook, SeamRepair, Skill
from programmable_kv.engine import Engine
from programmable_kv.models.load import Model
from programmable_kv.notebook.asking import asked
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.skills.store import SkillStore
from programmable_kv.storage.manifests import Entry
from programmable_kv.vllm_plugin.composing import Composition
from programmable_kv.vllm_plugin.matching import loadable, stages
from programmable_kv.vllm_plugin.prepare import compile_opening

HEAD = "You are the support agent of an online shop. These policies are in force today.\n\n"
TOPICS = ("refunds", "returns", "delivery", "warranty", "invoices", "accounts", "vouchers", "complaints")
QUESTION = "Which desk handles a request about {topic} of kind {kind}? Answer in one sentence."
GREEDY = 16
"""Number of greedy tokens compared."""
SEED = 3


def policy(topic: str, lines: int) -> str:
    """A policy with `lines` rules, different for each topic."""
    own = random.Random(f"{SEED} {topic}")
    rules = (
        f"- A request about {topic} of kind {kind} goes to desk {own.randint(10, 99)} and is answered within "
        f"{own.randint(2, 20)} days.\n"
        for kind in range(1, lines + 1)
    )
    return f"## Policy on {topic}\n{''.join(rules)}\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """The library's answer to a composed prompt: greedy tokens, and the log-probabilities at each step [T, V]."""

    tokens: tuple[int, ...]
    logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """A composed prompt and the library's answer to it."""

    name: str
    composition: Composition
    answer: Answer


@dataclass(frozen=True, slots=True)
class Shop:
    """A model, a store with the policies, and the prompts' opening."""

    model: Model
    store: SkillStore
    skills: dict[str, Skill]
    opening: Entry

    @classmethod
    def stocked(cls, model: Model, store: SkillStore, lines: int) -> Shop:
        skills = {topic: store.compile(model, policy(topic, lines), name=topic) for topic in TOPICS}
        return cls(model, store, skills, store.put(compile_opening(model, [("system", HEAD)])))

    def entries(self, topics: Sequence[str]) -> list[Entry]:
        return [self.store.entry(topic, self.model.fingerprint) for topic in topics]

    def asked(self, topics: Sequence[str], question: str) -> tuple[Notebook, list[int]]:
        """A conversation with these policies in its system message, and the ids of the tokens that open the answer."""
        text = HEAD + "".join("{" + topic + "}" for topic in topics)
        notebook = Notebook(self.model).message("system", text, **{topic: self.skills[topic] for topic in topics})
        notebook.message("user", question).prefill(repair=SeamRepair(0))
        opened = tokenised(self.model.tokenizer, Rendered(asked(notebook, None, think=False).text), Kind.TURN)
        return notebook, list(opened.ids)

    def composed(self, topics: Sequence[str], question: str, *, seam: int = 0) -> Composition:
        """The same prompt as a composition of the opening, the policies and the rest."""
        notebook, opened = self.asked(topics, question)
        end = notebook.part(topics[-1]).span.stop
        head = notebook.ids[: len(self.opening.unit.ids)]
        assert tuple(head) == self.opening.unit.ids, "the conversation must begin with the opening"
        return Composition.of([self.opening, *self.entries(topics), [*notebook.ids[end:], *opened]], seam=seam)

    def case(self, name: str, topics: Sequence[str], question: str) -> Case:
        """A case with the policies side by side, each loaded from its first token on."""
        notebook, opened = self.asked(topics, question)
        answer = answered(self.model.engine, notebook, opened)
        return Case(name, self.composed(topics, question), answer)

    def case_in_stages(self, name: str, topics: Sequence[str], question: str, block_size: int, seam: int) -> Case:
        """A case with raw text before and between the policies. vLLM computes this text, each policy's seam, and the
        rest of the seam's block; the library computes the same tokens here."""
        tokenizer = self.model.tokenizer
        words = [f"Part {number} of the rules.\n" for number in range(len(topics))]
        between = [list(tokenised(tokenizer, Rendered(each), Kind.TURN).ids) for each in words]
        last = list(tokenised(tokenizer, Rendered(question), Kind.TURN).ids)
        parts: list[Entry | Sequence[int]] = []
        for text, entry in zip(between, self.entries(topics), strict=True):
            parts += [text, entry]
        composition = Composition.of([*parts, last], seam=seam)
        notebook = Notebook(self.model).text(words[0])
        notebook.prefill()
        for number, topic in enumerate(topics):
            if number:
                notebook.add("user", words[number])
            computed = first_loaded(composition, number, block_size) - composition.placed[number].tokens.start
            notebook.splice(self.skills[topic], repair=SeamRepair(computed))
        assert notebook.ids == list(composition.ids[: len(notebook)]), "both must have the same tokens"
        return Case(name, composition, answered(self.model.engine, notebook, last))


def first_loaded(composition: Composition, number: int, block_size: int) -> int:
    """The first token of a skill that vLLM loads when the composition is sent in stages."""
    cached = 0
    for length in stages(composition.placed, len(composition.ids), block_size):
        for piece in loadable(composition.placed, cached, length):
            if composition.placed[number].tokens.start <= piece.start < composition.placed[number].tokens.stop:
                return piece.start
        cached = length // block_size * block_size
    raise AssertionError(f"skill {number} is not loaded in any stage")


def answered(engine: Engine, notebook: Notebook, last: list[int]) -> Answer:
    """The greedy answer to a prefilled context followed by the tokens `last`. The context is unchanged afterwards."""
    mark = notebook.mark()
    try:
        logits = engine.append(notebook.cache, last)
        tokens, rows = [], []
        for _ in range(GREEDY):
            rows.append(torch.log_softmax(logits[-1].cpu().double(), dim=-1))
            tokens.append(int(rows[-1].argmax()))
            logits = engine.append(notebook.cache, tokens[-1:])
        return Answer(tuple(tokens), torch.stack(rows))
    finally:
        notebook.rollback(mark)
