"""Short policies in everyday words, as rules or as a program, for models that were not trained on the grammar.

Small stock models solve about half of them, under the old value and under the new one.
"""

from __future__ import annotations

import random

from programmable_kv.scenarios.mentioned import Mentioned, Way

FIELDS = {
    "order_status": ("shipped", "pending", "returned"), "weather": ("sunny", "rainy", "windy"),
    "account_type": ("free", "premium", "trial"), "door": ("open", "closed", "locked"),
    "battery": ("full", "low", "empty"), "role": ("admin", "guest", "editor"),
    "traffic": ("light", "heavy", "blocked"), "signal": ("red", "green", "yellow"),
    "priority": ("high", "low", "normal"), "network": ("online", "offline", "slow"),
}  # fmt: skip
ACTIONS = ("cancel", "refund", "escalate", "approve", "reject", "wait", "notify", "archive", "retry", "delete", "call")
OTHERS = (
    "Greet people with the time of day.", "Invoices are numbered without gaps.", "Drafts are stored for thirty days.",
    "Signatures may be electronic.", "Backups run after midnight.", "Report broken chairs to the caretaker.",
)  # fmt: skip
RULES = Way("rules", ("If {field} is {value}, the action is {action}.",))
PROGRAM = Way("program", ('    "{value}": "{action}",',), declares=("{value}",))
EVERYDAY = (RULES, PROGRAM)
_PROGRAM = """```python
# {others[0]}
{field} = "{{{field}}}"

# {others[1]}
actions = {{{{
{rules}
}}}}
# {others[2]}
# {others[3]}
action = actions[{field}]
print(action)
```"""


def everyday(rng: random.Random, way: Way) -> Mentioned:
    """Draw one policy. Its rules name the field; in a program, the line that looks the value up names it."""
    field = rng.choice(sorted(FIELDS))
    values = rng.sample(FIELDS[field], 2)
    actions = dict(zip(values, rng.sample(ACTIONS, 2), strict=True))
    rules = [way.rules[0].format(field=field, value=value, action=action) for value, action in actions.items()]
    others = rng.sample(OTHERS, len(OTHERS))
    if way is PROGRAM:
        prompt = _PROGRAM.format(field=field, rules="\n".join(rules), others=others)
        asked = "What does this program print? Answer with the word only."
    else:
        lines = [*rules, *others]
        rng.shuffle(lines)
        listed = "\n".join(f"- {line}" for line in lines)
        prompt = f"You are a support agent.\n\n{field}: {{{field}}}\n\nRules:\n{listed}\n\nAnswer with the action only."
        asked = f"What is the action for the current {field}?"
    declared = tuple(word.format(value=value) for word in way.declares for value in values)
    old = rng.choice(values)
    new = next(value for value in values if value != old)
    return Mentioned(way, prompt, {field: old}, field, new, actions, declared, asked)
