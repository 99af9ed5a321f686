"""The bench on a real vLLM, as far as it can be tested without one: what each arm sends and when, and its figures.

With a vLLM, run `pkv bench serve-vllm --quick` (docs/serving.md).
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny, tokenizer
from programmable_kv.bench import serve_vllm, serve_vllm_decisions, serve_vllm_replay, serve_vllm_skills
from programmable_kv.bench.serve_vllm_arms import APPENDED, ARMS, BY_HAND, IN_PREFIX, SHORT, TURNS, body
from programmable_kv.bench.vllm_client import arrivals, times_of
from programmable_kv.errors import ExperimentError, InvalidArgumentError
from programmable_kv.serve.rewriting.rules import rules_of
from serve.rewriting_peers import CHAT, Peer, extends

TRACES = Path(__file__).parent.parent / "explain" / "traces"
CLOCKS = [600, 608, 616, 624]


def sent(arm: str, turn: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = body(arm, "the policy", 1, CLOCKS[: turn + 1], "salt")["messages"]
    return found


def test_only_the_clocks_place_differs_between_the_arms() -> None:
    early, later = sent(IN_PREFIX, 1), sent(IN_PREFIX, 2)
    assert early[0] != later[0]
    assert early[1:] == later[1:4]
    early, later = sent(APPENDED, 1), sent(APPENDED, 2)
    assert early == later[:4], "what was sent once is sent again"
    assert later[-1]["content"].endswith("Now: 10:16")
    early, later = sent(BY_HAND, 1), sent(BY_HAND, 2)
    assert early[:3] == later[:3]
    assert early[3] != later[3], "the earlier message has lost its clock"
    assert json.dumps(later).count("Now: ") == 1


@pytest.mark.parametrize("arm", [APPENDED, "gateway: erratum", "gateway: hoist"])
def test_what_an_arm_sends_upstream_extends_what_it_sent_before(arm: str) -> None:
    peer = Peer(rules=rules_of({"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}]}))
    policy = "".join(f"- Rule {number}: say what holds.\n" for number in range(40))
    bodies = [body(arm, policy, 1, CLOCKS[: turn + 1], "salt") for turn in range(TURNS)]
    if arm != APPENDED:
        bodies = [peer.send(each, session="one", route=CHAT) for each in bodies]
    assert all(extends(later, earlier) for earlier, later in itertools.pairwise(bodies))
    in_prefix = [body(IN_PREFIX, policy, 1, CLOCKS[: turn + 1], "salt") for turn in range(2)]
    assert not extends(in_prefix[1], in_prefix[0])


def test_arrivals_are_the_same_each_time_and_as_dense_as_asked() -> None:
    times = arrivals(400, 0.5)
    assert times == arrivals(400, 0.5)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(800, rel=0.2)


def test_percentiles_are_the_nearest_rank() -> None:
    rows = [{"ttft_ms": 1000.0 * number, "tpot_ms": None if number < 9 else 7.0} for number in range(1, 11)]
    assert times_of(rows) == {"ttft_p50_s": 5.0, "ttft_p90_s": 9.0, "ttft_p99_s": 10.0, "tpot_p50_ms": 7.0}


def test_the_summary_compares_each_arm_with_the_clock_in_the_prefix() -> None:
    rows = [
        {
            "policy": "short", "load": "light", "arm": arm, "seconds": 50.0 if arm == IN_PREFIX else 5.0, "hits": 9.0,
            "queries": 10.0,
            "requests": [
                {"ttft_ms": 1000.0 * (10 if arm == IN_PREFIX else 1), "tpot_ms": 5.0, "prompt_tokens": 20}
                for _ in range(10)
            ],
        }
        for arm in ARMS
    ]  # fmt: skip
    found = serve_vllm.summarise(rows)["short"]["light"]
    assert set(found) == set(SHORT.values())
    assert found["erratum"] == {
        "requests": 10, "prompt_tokens": 20, "hit_rate": 0.9, "ttft_p50_s": 1.0, "ttft_p90_s": 1.0, "ttft_p99_s": 1.0,
        "tpot_p50_ms": 5.0, "per_second": 2.0, "p50_lower": 10.0, "p90_lower": 10.0, "throughput_higher": 10.0,
    }  # fmt: skip
    assert "p90_lower" not in found["in"]


def test_the_whole_takes_as_long_as_its_document_says_and_the_quick_one_three_minutes() -> None:
    """Assuming prefills as slow as on the two cores of the record: 1,500 tokens in three and a half seconds."""

    def minutes(policies: Any) -> float:
        cases = [(each, load, arm) for each in policies for load in each.loads for arm in ARMS]
        return serve_vllm.estimated_s(cases, 3.5, len(serve_vllm.POLICIES[0].text())) / 60

    assert minutes(serve_vllm.POLICIES) < 60
    assert minutes(serve_vllm.QUICK) < 3


def test_conversations_are_whole_and_settings_give_the_policies_back() -> None:
    for policies in (serve_vllm.POLICIES, serve_vllm.QUICK):
        loads = [load for each in policies for load in each.loads]
        assert all(load.requests % TURNS == load.in_prefix % TURNS == 0 for load in loads)
        settings = json.loads(json.dumps({"policies": [serve_vllm._plain(each) for each in policies]}))
        assert serve_vllm.policies_of(settings) == list(policies)


def test_each_decision_is_one_that_a_stale_value_gets_wrong() -> None:
    drawn = serve_vllm_decisions.decisions(6)
    assert drawn[:3] == serve_vllm_decisions.decisions(3)
    for each in drawn:
        before, after = each.actions
        assert before[0] != after[0]
        assert each.system(each.old) != each.system(each.new)
        peer = Peer(rules=rules_of({"volatile": [each.rule], "learn": False}))
        for number, value in enumerate((each.old, each.new)):
            messages = [{"role": "system", "content": each.system(value)}, {"role": "user", "content": each.asked}]
            peer.send({"model": "m", "messages": messages}, session=str(number))
        assert (peer.action, f'"{each.field}": "{each.new}"' in peer.line) == ("shared", True)


def test_the_decisions_of_each_arm_are_compared_with_the_value_in_its_place() -> None:
    row = {"right": "b", "right_before": "a", "before": "a", "in": "b", "in_later": "b"}
    did = {"hoist_action": "hoisted", "erratum_shared_action": "shared", "erratum_later_action": "erratum"}
    arms = dict.fromkeys(serve_vllm_decisions.ORACLES, "b")
    wrong = {**row, **arms, **did, "hoist": "a", "number": 1}
    undecided = {**row, **arms, **did, "in": "a", "number": 2}
    found = serve_vllm_decisions.summarise([{**row, **arms, **did, "number": 0}, wrong, undecided])
    assert (found["policies"], found["decided"]) == (3, 2)
    assert found["hoist"]["decided"]["value"] == 0.5
    assert found["appended"]["decided"]["value"] == 1.0
    assert found["stale"]["decided"]["value"] == 0.0
    assert found["appended"]["agreement"]["value"] == pytest.approx(2 / 3)
    assert found["erratum_shared"]["actions"] == {"shared": 3}


def test_a_trace_keeps_its_breaks_and_shares_exactly_the_blocks_that_it_shared() -> None:
    trace = json.loads((TRACES / "trace_0403.json").read_text(encoding="utf-8"))
    shape = serve_vllm_replay.shape_of(trace, 5)
    for asked, request in zip(shape.requests, trace["requests"], strict=False):
        assert [block for _, own in asked.messages for block in own] == request["hash_ids"]
        roles = [role for role, _ in asked.messages]
        assert roles[:2] == ["system", "user"]
        assert roles[-1] == "user"
        assert all(one != other for one, other in itertools.pairwise(roles)), "roles take turns"
    grown = [
        other.messages[: len(one.messages)] == one.messages
        for one, other in zip(shape.requests, shape.requests[1:], strict=False)
    ]
    assert grown == [True, True, False, True], "most of the prefix is lost between the third and the fourth"
    pauses = [later.at_s - earlier.at_s for earlier, later in zip(shape.requests, shape.requests[1:], strict=False)]
    assert max(pauses) <= serve_vllm_replay.LONGEST_PAUSE_S + 0.01


def test_a_gateway_keeps_the_prefix_of_a_replayed_trace_but_where_its_client_breaks_it() -> None:
    (shape,) = serve_vllm_replay.shapes_in(TRACES)
    peer = Peer(rules=rules_of(serve_vllm_replay.RULES))
    for number in range(len(shape.requests)):
        peer.send(serve_vllm_replay.body(serve_vllm_replay.GATEWAY, shape, number, "salt"), session=shape.name)
    actions = [str(work.plan.action) for work in peer.works]
    assert actions == ["announced", "erratum", "erratum", "announced", "erratum"], "its system prompt is another then"
    with pytest.raises(InvalidArgumentError, match="contains no traces"):
        serve_vllm_replay.shapes_in(TRACES.parent / "nothing")


def test_the_two_ways_of_asking_for_skills_are_summed_up() -> None:
    def asked(ttft: float) -> dict[str, Any]:
        return {"ttft_ms": ttft, "tpot_ms": 3.0, "prompt_tokens": 100, "cached_tokens": 90}

    rows = [
        {"load": "alone", "way": way, "loaded": 270.0, "requests": [asked(ttft)] * 3}
        for way, ttft in (("plain", 900.0), ("composed", 90.0))
    ]
    found = serve_vllm_skills.summarise(rows)
    assert found["alone"]["composed"]["tokens_loaded"] == 90
    assert found["alone"]["p50_lower"] == found["alone"]["p90_lower"] == 10.0


def test_an_environment_without_vllm_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny(max_position_embeddings=4096).engine.model.save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    with pytest.raises(ExperimentError, match="vLLM did not start"):
        serve_vllm.run(sys.executable, tmp_path / "serve-vllm.json", model=str(folder), policies=serve_vllm.QUICK[:1])
