"""A slice of the product on a real vLLM: runs where PKV_VLLM_PYTHON names the interpreter of an environment with vLLM.

One engine is started for all of it, with the embedded model and one store. docs/vllm.md says how to make the environment.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from programmable_kv import Notebook, SeamRepair
from programmable_kv.bench.vllm_asking import BLOCK_SIZE
from programmable_kv.bench.vllm_cases import TOPICS, Case, Shop, policy
from programmable_kv.bench.vllm_cases import answered as library_answer
from programmable_kv.lab.obedience import policies
from programmable_kv.models.source import find_source
from programmable_kv.notebook.asking import asked
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.scenarios.grammar import Gate, Scenario
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.rules import rules_of
from programmable_kv.serve.settings import GatewaySettings
from programmable_kv.skills.store import SkillStore
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.prepare import certify, compile_opening
from serve.http_peers import running, wait_until
from vllm_plugin.real_engine import PATIENCE_S, VARIABLE, Completion, Engine, engine

PYTHON = os.environ.get(VARIABLE, "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(
        not PYTHON, reason=f"{VARIABLE} does not name the interpreter of an environment with vLLM (docs/vllm.md)"
    ),
]
HEALTHY, TURNED, DAMAGED = TOPICS[:3], TOPICS[3], TOPICS[4]
LARGEST_DIFFERENCE = 1e-3
"""of log-probabilities: float32, other kernels and another order of sums"""
LINES = 3
BEGINS = "You are the support agent of an online shop. These policies are in force today.\n"
ASKED = "Which desk handles a request of kind 2? Answer in one sentence."


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def shop(scratch: Path) -> Shop:
    """A store of skills: one says that it was computed one position later than it was, and one has a bit flipped."""
    folder = find_source("embedded").folder
    assert folder is not None
    model, _ = certify(folder, blobs_at(scratch / "store"))
    found = Shop.stocked(model, SkillStore(scratch / "store"), LINES)
    wrong = found.skills[TURNED]
    found.store.put(replace(wrong, segment=replace(wrong.segment, computed_at=wrong.segment.computed_at + 1)))
    [entry] = found.entries([DAMAGED])
    file = scratch / "store" / entry.tensors
    body = bytearray(file.read_bytes())
    body[-7] ^= 4
    file.write_bytes(bytes(body))
    return found


@pytest.fixture(scope="module")
def vllm(shop: Shop, scratch: Path) -> Iterator[Engine]:
    folder = find_source("embedded").folder
    assert folder is not None
    with engine(PYTHON, folder, scratch / "store", scratch) as found:
        yield found


def answered(vllm: Engine, case: Case, salt: str) -> Completion:
    """vLLM's answer to a composed prompt."""
    [body] = case.composition.requests(salt, BLOCK_SIZE)
    return vllm.complete({**body, "max_tokens": len(case.answer.tokens)})


def largest_difference(case: Case, given: Completion) -> float:
    """From the library's own splice, as long as both answer the same text."""
    worst = 0.0
    for step, likely in enumerate(given.likeliest):
        worst = max(worst, *(abs(float(case.answer.logprobs[step, token]) - share) for token, share in likely.items()))
        if given.tokens[step] != case.answer.tokens[step]:
            break
    return worst


def test_a_composed_prompt_equals_the_librarys_splice(shop: Shop, vllm: Engine) -> None:
    for number, topics in enumerate((HEALTHY, HEALTHY[::-1])):
        case = shop.case("side by side", topics, ASKED)
        given = answered(vllm, case, f"splice-{number}")
        assert given.why == ""
        assert given.loaded > sum(len(shop.skills[topic]) for topic in topics)
        assert given.tokens == list(case.answer.tokens)
        assert largest_difference(case, given) <= LARGEST_DIFFERENCE


def test_a_rotation_that_is_off_by_one_shows(shop: Shop, vllm: Engine) -> None:
    """The comparison sees a wrong position."""
    case = shop.case("turned", [TURNED], ASKED)
    given = answered(vllm, case, "turned")
    assert given.loaded
    assert largest_difference(case, given) > 100 * LARGEST_DIFFERENCE


def test_a_damaged_skill_is_computed_by_vllm(shop: Shop, vllm: Engine) -> None:
    case = shop.case("damaged", [DAMAGED], ASKED)
    given = answered(vllm, case, "damaged")
    assert given.loaded == 0
    assert "could not be read" in given.why or "damaged" in given.why.lower(), given.why
    with torch.no_grad():
        logits = shop.model.engine.model(torch.tensor([case.composition.ids])).logits[0, -1]
    whole = torch.log_softmax(logits.double(), dim=-1)
    assert max(abs(float(whole[token]) - share) for token, share in given.likeliest[0].items()) <= LARGEST_DIFFERENCE


# -- the gateway in front of it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return policies(1)[0]


def question_of(scenario: Scenario) -> tuple[Gate, str, str, str]:
    """What the policy decides, its value now, another value that it decides otherwise by, and a question."""
    [gate] = scenario.gates
    old = scenario.values[gate.field]
    now = gate.actions[old]
    new = next(value for value, action in sorted(gate.actions.items()) if action[0] != now[0])
    return gate, old, new, question(random.Random(0), PHRASINGS["held_out"], gate.topic, think=False)


def decided(
    client: openai.OpenAI, shop: Shop, model: str, messages: list[Any], actions: tuple[str, str]
) -> tuple[str, Any]:
    """The likelier of two actions by the answer's first token, and the usage."""
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20
    )
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    shares = {each.token: each.logprob for each in content.content[0].top_logprobs}
    tokenizer = shop.model.tokenizer
    firsts = [tokenizer.decode(tokenizer.encode(action, add_special_tokens=False)[:1]) for action in actions]
    return max(zip(actions, firsts, strict=True), key=lambda it: shares.get(it[1], -99.0))[0], answer.usage


def test_a_notebook_decides_by_its_latest_value_and_its_head_is_hit(
    shop: Shop, vllm: Engine, scenario: Scenario
) -> None:
    gate, old, new, said = question_of(scenario)
    actions = (gate.actions[old], gate.actions[new])
    with (
        running(GatewaySettings(vllm.url, port=0)) as front,
        httpx2.Client(base_url=front.url, timeout=PATIENCE_S) as http,
    ):
        client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
        made = http.post(
            "/v1/notebooks",
            json={
                "upstream_model": "served",
                "messages": [{"role": "system", "content": scenario.prompt}],
                "fields": scenario.values,
            },
        )
        assert made.status_code == 201, made.text
        book = made.json()
        turns: list[Any] = [{"role": "user", "content": said}]
        before, usage = decided(client, shop, book["model"], turns, actions)
        assert before == actions[0]
        assert usage.prompt_tokens > 4 * BLOCK_SIZE
        edited = http.patch(f"/v1/notebooks/{book['id']}/fields", json={gate.field: new})
        assert edited.status_code == 200, edited.text
        after, usage = decided(client, shop, book["model"], turns, actions)
        assert after == actions[1]
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached >= usage.prompt_tokens - 5 * BLOCK_SIZE
        assert cached >= 2 * BLOCK_SIZE, "the head is read from the cache after the edit"
        counted = http.get(f"/v1/notebooks/{book['id']}").json()["usage"]
        assert counted["requests"] >= 1


def test_a_notebook_with_skills_is_composed_by_the_gateway(shop: Shop, vllm: Engine, scratch: Path) -> None:
    """The same prompt as the library's splice: the skills are loaded at the first request, and the answer is the splice's."""
    texts = {f"chat-{topic}": f"{policy(topic, LINES).strip()}\n" for topic in HEALTHY}
    skills = {name: shop.store.compile(shop.model, text, name=name) for name, text in texts.items()}
    shop.store.put(compile_opening(shop.model, [("system", BEGINS)]))
    placed = "".join("{" + name + "}" for name in skills)
    oracle = Notebook(shop.model).message("system", BEGINS + placed, **skills)
    oracle.message("user", ASKED).prefill(repair=SeamRepair(0))
    opened = tokenised(shop.model.tokenizer, Rendered(asked(oracle, None, think=False).text), Kind.TURN)
    expected = library_answer(shop.model.engine, oracle, list(opened.ids))
    names = dict(zip(skills, skills, strict=True))
    settings = GatewaySettings(vllm.url, port=0, skills=str(scratch / "store"))
    with running(settings) as front, httpx2.Client(base_url=front.url, timeout=PATIENCE_S) as http:
        found: list[str] = []

        def answer(text: str) -> tuple[str, Any]:
            body = {"upstream_model": "served", "messages": [{"role": "system", "content": text}], "skills": names}
            book = http.post("/v1/notebooks", json=body)
            assert book.status_code == 201, book.text
            request = {
                "model": book.json()["model"], "messages": [{"role": "user", "content": ASKED}], "max_tokens": 4,
                "temperature": 0, "logprobs": True, "top_logprobs": 20,
            }  # fmt: skip
            claude = {"model": request["model"], "messages": request["messages"], "max_tokens": 1}
            for route, asked_for in (("/v1/messages", claude), ("/v1/chat/completions", request)):
                got = http.post(route, json={**asked_for, "cache_salt": route.rpartition("/")[2]})
                assert got.status_code == 200, got.text
                found.append(got.headers["x-pkv-skills"])
            return got.headers["x-pkv-skills"], got.json()

        told, composed = answer(BEGINS + placed)
        assert told == f"named={1 + len(skills)}"
        assert composed["usage"]["prompt_tokens"] == len(oracle) + len(opened.ids)
        said = composed["kv_transfer_params"]["skills"]
        assert said["why"] == ""
        assert said["tokens_loaded"] == oracle.part(list(skills)[-1]).span.stop
        first = composed["choices"][0]["logprobs"]["content"][0]
        assert first["token"] == shop.model.tokenizer.decode([expected.tokens[0]])
        assert abs(first["logprob"] - float(expected.logprobs[0].max())) <= LARGEST_DIFFERENCE
        assert found == [told, told], "Messages are composed as Chat Completions are"
        told, plain = answer(f"{BEGINS}#{placed}")
        assert told.startswith("none; why="), "the text before the skill merges with its first token"
        assert not plain.get("kv_transfer_params")


def test_in_mode_erratum_a_turn_after_a_change_reads_the_head_from_the_cache(
    shop: Shop, vllm: Engine, scenario: Scenario
) -> None:
    gate, old, new, said = question_of(scenario)
    name = "{" + gate.field + "}"
    begins, _, ends = next(line for line in scenario.prompt.splitlines() if name in line).partition(name)
    rules = rules_of(
        {"volatile": [{"name": gate.field, "pattern": f"^{re.escape(begins)}(.*?){re.escape(ends)}$"}], "learn": False}
    )
    settings = GatewaySettings(vllm.url, port=0, mode=GatewayMode.ERRATUM, rules=rules)
    with running(settings) as front, httpx2.Client(base_url=front.url, timeout=PATIENCE_S) as http:
        found = []

        def told() -> dict[str, str]:
            rows = http.get("/pkv/report").json()["rewriting"]["upstream"]
            return {row["about"]: row["verdict"] for row in rows}

        for value in (old, new):
            system = scenario.prompt.format(**{**scenario.values, gate.field: value})
            messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
            body = {"model": "served", "messages": messages, "max_tokens": 1, "temperature": 0, "cache_salt": "mode"}
            got = http.post("/v1/chat/completions", json=body, headers={"x-session-id": "one"})
            assert got.status_code == 200, got.text
            found.append((got.headers["x-pkv-action"], got.json()["usage"]))
            wait_until(lambda: told().get("line as system, rendered") == "intact")
        assert told()["line as system"] in ("taken", "accepted"), "its own rendering proved that it may stand there"
    assert [action for action, _ in found] == ["announced", "erratum"]
    usage = found[1][1]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 5 * BLOCK_SIZE
