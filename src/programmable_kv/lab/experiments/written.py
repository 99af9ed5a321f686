"""A prompt as the model reads it, slot by slot: its tokens, and the kind of text that each token belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from programmable_kv.cache.span import Span
from programmable_kv.lab.experiments.cases import Case
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.chat import thought_closed
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.scenarios.everyday import OTHERS
from programmable_kv.scenarios.phrasings import FILLERS


class Part(StrEnum):
    """The part of a rule that a token belongs to."""

    NAME = "name"
    """Everything before the value, including the field's name."""
    VALUE = "value"
    LINK = "link"
    """Between the value and the action."""
    ACTION = "action"
    END = "end"
    """After the action: the full stop and the line break."""
    NONE = ""
    """Not in a rule."""


class Text(StrEnum):
    """The kind of text that a token belongs to."""

    BEFORE = "before"
    """Everything before the field."""
    FIELD = "field"
    """The field's value."""
    STATE = "state"
    """The rest of the field's line, and other fields."""
    OLD_RULE = "old_rule"
    """The rule of the cached context's value."""
    NEW_RULE = "new_rule"
    """The rule of the field's new value."""
    OTHER_RULE = "other_rule"
    """Rules of the field's other values."""
    FILLER = "filler"
    """Rules about other things."""
    REST = "rest"
    """Headings, the list of actions, how to answer."""
    QUESTION = "question"
    TEMPLATE = "template"
    """What the chat template writes between and after the messages, without the last token."""
    LAST = "last"
    """The last token, whose row decides."""


LATER = tuple(kind for kind in Text if kind not in (Text.BEFORE, Text.FIELD, Text.LAST))
"""Kinds of text between the field and the row that decides."""
RULES = (Text.OLD_RULE, Text.NEW_RULE, Text.OTHER_RULE)
"""Lines that name the field."""
TAIL = (Text.QUESTION, Text.TEMPLATE)


@dataclass(frozen=True, slots=True)
class Written:
    """A whole prompt, up to the row whose logits decide."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The characters of each token."""
    kinds: tuple[Text, ...]
    parts: tuple[Part, ...]
    field: Span
    ends: str
    """The prompt's last characters. How an answer is tokenised depends on them."""

    @property
    def last(self) -> int:
        """The slot of the row that decides."""
        return len(self.ids) - 1

    @property
    def later(self) -> tuple[int, ...]:
        """The slots between the field and the row that decides."""
        return tuple(range(self.field.stop, self.last))

    def of(self, *kinds: Text) -> tuple[int, ...]:
        """The later slots that belong to these kinds of text."""
        return tuple(slot for slot in self.later if self.kinds[slot] in kinds)

    def delimits(self, slot: int) -> bool:
        """Whether a token of a message has no letter and no digit: punctuation, a line break, a bullet."""
        return self.kinds[slot] is not Text.TEMPLATE and not any(c.isalnum() for c in self.tokens[slot])

    @property
    def delimiters(self) -> tuple[int, ...]:
        return tuple(slot for slot in self.later if self.delimits(slot))

    def role(self, slot: int) -> str:
        """A token's role by its place, in words that mean the same in every policy."""
        kind = self.kinds[slot]
        if kind is Text.TEMPLATE:
            return f"{kind} {slot - self.last}"
        if kind is Text.QUESTION:
            return f"{kind} {max(slot - max(self.of(kind)), -6)}"
        if kind in RULES:
            return f"{kind} {self.parts[slot]}"
        return f"{kind} {'delimiter' if self.delimits(slot) else 'word'}"


def written(
    model: Model, case: Case, change: tuple[str, str], values: Mapping[str, str], *, system: str | None = None
) -> Written:
    """The policy with these values, the question, and the opening of the answer.

    Args:
        change: the old and the new value, whose rules have kinds of their own.
        system: template to use instead of the policy's own. The question holds the placeholder of a field it lacks.
    """
    template = case.scenario.prompt if system is None else system
    said, stated = (_fields_in(each, values) for each in (case.asked, template))
    notebook = Notebook(model).message("system", template, **stated).message("user", case.asked, **said)
    conversation = notebook.prompt.conversation()
    assert conversation is not None
    opening = thought_closed(conversation.continued([], prompt_for_answer=True).added)
    units = [
        tokenised(model.tokenizer, notebook.rendered(), Kind.PREFILL),
        tokenised(model.tokenizer, Rendered(opening), Kind.TURN),
    ]
    body = units[0]
    (span,) = [place.tokens for place in body.places if place.name == case.gate.field]
    starts = [int(start) for start in body.offsets[:, 0]] + [len(body.text)] * len(units[1])
    tokens = [unit.text[int(a) : int(b)] for unit in units for a, b in unit.offsets]
    asked = case.asked.format_map(dict(said)) if said else case.asked
    kind_at, part_at = _kinds(body.text, case, change, template.format_map(dict(values)), asked)
    # Most tokens begin with a space. A token's kind is that of the first character after it.
    says = [start + len(token) - len(token.lstrip(" ")) for start, token in zip(starts, tokens, strict=True)]
    kinds = [kind_at[start] if start < len(kind_at) else Text.TEMPLATE for start in says]
    parts = [part_at[start] if start < len(part_at) else Part.NONE for start in says]
    kinds = [Text.BEFORE if slot < span.start else kind for slot, kind in enumerate(kinds)]
    kinds[span.start : span.stop] = [Text.FIELD] * len(span)
    kinds[-1] = Text.LAST
    ids = tuple(token for unit in units for token in unit.ids)
    return Written(ids, tuple(tokens), tuple(kinds), tuple(parts), span, opening or body.text)


def _fields_in(template: str, values: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if "{" + name + "}" in template}


def _kinds(text: str, case: Case, change: tuple[str, str], policy: str, question: str) -> tuple[list[Text], list[Part]]:
    """The kind of text and the part of a rule of each character of the rendered messages."""
    kinds, parts = [Text.TEMPLATE] * len(text), [Part.NONE] * len(text)
    start = text.index(policy)
    asked = text.index(question, start + len(policy))
    kinds[asked : asked + len(question)] = [Text.QUESTION] * len(question)
    in_rules = False
    for line in policy.splitlines(keepends=True):
        bare = line.strip("-* \n")
        value = ruled(bare, case)
        if value is None:
            kind = _kind(bare, case, in_rules=in_rules)
        else:
            kind = {change[0]: Text.OLD_RULE, change[1]: Text.NEW_RULE}.get(value, Text.OTHER_RULE)
            parts[start : start + len(line)] = _parts(line, case, value)
        in_rules = in_rules or bare.lstrip("# ").rstrip(":") in ("Policy", "Rules")
        kinds[start : start + len(line)] = [kind] * len(line)
        start += len(line)
    return kinds, parts


def ruled(line: str, case: Case) -> str | None:
    """The value whose rule a line is; None if it is not a rule of the field."""
    gate = case.gate
    held = [value for value, action in gate.actions.items() if all(it in line for it in (gate.field, value, action))]
    return max(held, key=len, default=None)


def _parts(line: str, case: Case, value: str) -> list[Part]:
    """The part of each character of a rule. The value comes before the action."""
    name = line.index(case.gate.field) + len(case.gate.field)
    says = line.index(value, name)
    does = line.index(case.gate.actions[value], says + len(value))
    ends = does + len(case.gate.actions[value])
    lengths = ((Part.NAME, says), (Part.VALUE, len(value)), (Part.LINK, does - says - len(value)))
    parts = [part for part, length in lengths for _ in range(length)]
    return [*parts, *[Part.ACTION] * (ends - does), *[Part.END] * (len(line) - ends)]


def _kind(line: str, case: Case, *, in_rules: bool) -> Text:
    if in_rules:
        return Text.FILLER if line in (*FILLERS["held_out"], *OTHERS) else Text.REST
    return Text.STATE if any(name in line for name in (*case.scenario.values, "case_id")) else Text.REST
