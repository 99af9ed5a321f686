"""The demo on a tiny random model: every case in every mode, and the page with them."""

from __future__ import annotations

from conftest import tiny
from programmable_kv.demo import demo


def test_every_case_runs_in_every_mode_and_is_on_the_page() -> None:
    results = list(demo.run(tiny("llama", max_position_embeddings=4096)))
    assert [case for case, _, _ in results] == list(demo.CASES)
    for case, before, outcomes in results:
        assert [outcome.mode for outcome in outcomes] == [*demo.MODES, demo.DESIGN]
        assert set(before.probabilities) == {case.before, case.after}
        by_mode = {outcome.mode: outcome for outcome in outcomes}
        assert by_mode[demo.Mode.FULL].agrees
        assert by_mode[demo.Mode.SUFFIX].agrees, "it computes the same numbers as a full prefill"
        assert by_mode[demo.DESIGN].decision.account.exact
        assert by_mode[demo.Mode.STALE].decision.choice == before.choice
    page = demo.html_page("a <tiny> model", results)
    assert "a &lt;tiny&gt; model" in page
    assert page.count("<details>") == len(demo.CASES) * (len(demo.MODES) + 1)


def test_the_policy_holds_every_field_once() -> None:
    for name in demo.VALUES:
        assert demo.policy().count("{" + name + "}") == 1
