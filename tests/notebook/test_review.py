"""What a review of the house found, each as the smallest program that shows it."""

from __future__ import annotations

import pytest

from conftest import tiny
from programmable_kv import Notebook, Skill
from programmable_kv.errors import InvalidEditError


@pytest.mark.parametrize("first", ["skill", "field"])
def test_a_prompt_and_a_skill_in_it_agree_on_a_field(first: str) -> None:
    """Two values of one field were accepted: the text said one, `fields` the other, and every token was called exact."""
    skill = Skill.compile(tiny(), "status: {status}.", name="policy", status="pending")
    notebook = Notebook(tiny())
    turns = {"skill": ("{policy}", {"policy": skill}), "field": ("now {status}.", {"status": "shipped"})}
    content, given = turns.pop(first)
    notebook.message("system", content, **given)
    fields = notebook.fields
    (content, given), *_ = turns.values()
    with pytest.raises(InvalidEditError, match="status was declared before as"):
        notebook.message("user", content, **given)
    assert notebook.fields == fields
    notebook.prefill()


def test_a_message_agrees_with_the_skills_in_it() -> None:
    one = Skill.compile(tiny(), "status: {status}.", name="one", status="pending")
    other = Skill.compile(tiny(), "the status is {status}.", name="other", status="shipped")
    for content, given in (
        ("{one} {other}", {"one": one, "other": other}),
        ("{one} {status}", {"one": one, "status": "x"}),
    ):
        with pytest.raises(InvalidEditError, match="status was declared before as"):
            Notebook(tiny()).message("system", content, **given)


def test_a_plan_counts_no_gap_that_it_opens_at_the_end() -> None:
    """A value that ends one part, and another that is the last part: slots still to be computed counted as relocated."""
    text = "tier {tier}" + " and then" * 30 + " status {status}"
    notebook = Notebook(tiny()).text(text, tier="a", status="x")
    notebook.skill(Skill.compile(tiny(), "{date}", name="last", date="2026"))
    notebook.prefill()
    changes = {"tier": "gold and silver", "status": "cancelled by the customer", "date": "delivered and returned"}
    plan = notebook.plan.edit(changes, mode="in_place")
    account = notebook.edit(changes, mode="in_place")
    assert plan.tokens_relocated == account.tokens_relocated > 0
