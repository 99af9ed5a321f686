"""Skills by name in a gateway's notebooks: when the gateway names them to the upstream, and when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from programmable_kv import Model, SkillStore
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import CorruptFileError, UnknownSkillError
from programmable_kv.serve.access import ApiKey, new_key
from programmable_kv.serve.notebooks.stored import StoredTexts
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.settings import GatewaySettings
from programmable_kv.vllm_plugin.marks import parse_marks
from programmable_kv.vllm_plugin.matching import place
from programmable_kv.vllm_plugin.prepare import compile_opening
from serve.caching_upstream import CachingUpstream
from serve.http_peers import Received, answer, raw_upstream, running

HEAD = "You are the agent of a shop. These policies hold.\n"
REFUNDS = "Refunds are paid within ten days.\n"
RETURNS = "Returns are free for thirty days.\n"
MERGES = "ing today.\n"
ASKED = [{"role": "user", "content": "May I return it?"}]
CHAT = "/v1/chat/completions"


class RenderingUpstream(CachingUpstream):
    """An upstream that also renders prompts to token ids like vLLM, with a real tokenizer and chat template."""

    def __init__(self, model: Model, *, renders: bool = True) -> None:
        super().__init__()
        self.model, self.renders = model, renders
        self.rendered = 0

    async def __call__(self, request: Received) -> AsyncIterator[bytes]:
        if not request.target.endswith((b"/render", b"/tokenize")):
            async for part in super().__call__(request):
                yield part
        elif self.renders:
            self.rendered += 1
            name = "tokens" if request.target == b"/tokenize" else "token_ids"
            yield answer(json.dumps({name: self.tokens(request.json)}).encode())
        else:
            yield answer(b'{"detail": "Not Found"}', "404 Not Found")

    def tokens(self, body: Any) -> list[int]:
        system = body.get("instructions") or "".join(each["text"] for each in body.get("system") or ())
        messages = [
            *([{"role": "system", "content": system}] if system else []),
            *(body.get("messages") or body["input"]),
        ]
        text = self.model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_chat_model(1024)


@pytest.fixture(scope="module")
def store(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skills")
    found = SkillStore(folder)
    found.compile(model, REFUNDS, name="refunds")
    found.compile(model, RETURNS, name="returns")
    found.compile(model, MERGES, name="merges")
    found.put(compile_opening(model, [("system", HEAD)]))
    return folder


@pytest.fixture
def upstream(model: Model) -> RenderingUpstream:
    return RenderingUpstream(model)


@pytest.fixture
def http(upstream: RenderingUpstream, store: Path) -> Iterator[httpx2.Client]:
    with (
        raw_upstream(upstream) as server,
        running(GatewaySettings(server.url, port=0, skills=str(store), line_role=LineRole.SYSTEM)) as front,
        httpx2.Client(base_url=front.url, timeout=30) as found,
    ):
        yield found


def made(http: httpx2.Client, system: str, **more: Any) -> dict[str, Any]:
    body = {"upstream_model": "m", "messages": [{"role": "system", "content": system}]}
    got = http.post("/v1/notebooks", json={**body, "skills": {"a": "returns", "b": "refunds"}, **more})
    assert got.status_code == 201, got.text
    found: dict[str, Any] = got.json()
    return found


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
def test_skills_are_named_where_their_tokens_stand(
    path: str, http: httpx2.Client, upstream: RenderingUpstream, store: Path
) -> None:
    book = made(http, HEAD + "{a}{b}")
    assert book["skills"] == {"a": "returns", "b": "refunds"}
    asked = {"input" if path.endswith("responses") else "messages": ASKED, "max_tokens": 5}
    got = http.post(path, json={"model": book["model"], **asked})
    assert got.status_code == 200, got.text
    assert got.headers["x-pkv-skills"] == "named=3"
    [body] = upstream.bodies
    assert body["cache_salt"] == "composed:local"
    marks = parse_marks(body["kv_transfer_params"])
    assert marks is not None
    ids, entries = upstream.tokens(body), SkillStore(store)
    assert [entries.entry(mark.skill).name for mark in marks.marks] == ["opening", "returns", "refunds"]
    reached = 0
    for mark in marks.marks:  # the same check as the plugin's
        reached = place(mark.skill, entries.entry(mark.skill).unit.ids, ids, mark.start, after=reached).stop
    assert marks.marks[0].start == 0
    assert marks.marks[1].start == len(entries.entry("opening").unit.ids)


def test_places_are_remembered_and_an_edit_keeps_the_head(http: httpx2.Client, upstream: RenderingUpstream) -> None:
    book = made(http, HEAD + "{a}{b}The order is {status}.", fields={"status": "pending"})
    for status in ("pending", "shipped", "lost"):
        http.patch(f"/v1/notebooks/{book['id']}/fields", json={"status": status})
        got = http.post(CHAT, json={"model": book["model"], "messages": ASKED, "cache_salt": "mine"})
        assert got.headers["x-pkv-skills"] == "named=3"
    assert upstream.rendered == 1
    assert len({json.dumps(body["kv_transfer_params"]) for body in upstream.bodies}) == 1
    assert len({body["messages"][0]["content"] for body in upstream.bodies}) == 1
    [salt] = {body["cache_salt"] for body in upstream.bodies}
    assert salt.startswith("composed:local-")
    assert "lost" in upstream.bodies[-1]["messages"][-1]["content"]


def test_a_skill_that_does_not_stand_there_makes_an_ordinary_request(
    http: httpx2.Client, upstream: RenderingUpstream
) -> None:
    """The skill's first token merges with the text before it, so the gateway sends the skill as plain text."""
    book = made(http, "The shop is work{a}", skills={"a": "merges"})
    got = http.post(CHAT, json={"model": book["model"], "messages": ASKED, "cache_salt": "mine"})
    assert got.status_code == 200
    assert got.headers["x-pkv-skills"].startswith("none; why=")
    assert "are not in the prompt" in got.headers["x-pkv-skills"]
    [body] = upstream.bodies
    assert body["cache_salt"] == "mine"
    assert "kv_transfer_params" not in body
    assert body["messages"][0]["content"] == f"The shop is work{MERGES}"


def test_an_upstream_that_renders_nothing_gets_text(model: Model, store: Path) -> None:
    upstream = RenderingUpstream(model, renders=False)
    with (
        raw_upstream(upstream) as server,
        running(GatewaySettings(server.url, port=0, skills=str(store))) as front,
        httpx2.Client(base_url=front.url, timeout=30) as http,
    ):
        book = made(http, HEAD + "{a}{b}")
        got = http.post(CHAT, json={"model": book["model"], "messages": ASKED})
    assert (got.status_code, upstream.bodies[0]["messages"][0]["content"]) == (200, HEAD + RETURNS + REFUNDS)
    assert "does not render" in got.headers["x-pkv-skills"]


def test_tenants_compose_under_salts_of_their_own(model: Model, store: Path) -> None:
    upstream = RenderingUpstream(model)
    keys = {name: new_key(name) for name in ("one", "two")}
    known = tuple(ApiKey(name, line.partition(":")[2]) for name, (_, line) in keys.items())
    with raw_upstream(upstream) as server:
        for salts in (False, True):
            settings = GatewaySettings(server.url, port=0, skills=str(store), keys=known, salts=salts)
            with running(settings) as front:
                for key, _ in keys.values():
                    bearer = {"authorization": f"Bearer {key}"}
                    with httpx2.Client(base_url=front.url, timeout=30, headers=bearer) as http:
                        book = made(http, HEAD + "{a}{b}")
                        assert http.post(CHAT, json={"model": book["model"], "messages": ASKED}).status_code == 200
    found = [body["cache_salt"] for body in upstream.bodies]
    assert found[:2] == ["composed:one", "composed:two"]
    assert len(set(found)) == 4
    assert all(salt.startswith("composed:") and len(salt) <= 128 for salt in found)


def test_a_tenant_s_own_skills_are_named_by_nobody_else(model: Model, tmp_path: Path) -> None:
    """For other tenants, such a skill does not exist, neither by its name nor by its key."""
    skills = SkillStore(tmp_path / "skills")
    for name in ("one.secret", "one.more.secret", "published", "oneself"):
        skills.compile(model, f"Of {name}: {REFUNDS}", name=name)
    keys = {name: new_key(name) for name in ("one", "one.more", "two")}
    known = tuple(ApiKey(name, line.partition(":")[2]) for name, (_, line) in keys.items())
    may = {
        "one": {"one.secret", "published", "oneself"},
        "one.more": {"one.more.secret", "published", "oneself"},
        "two": {"published", "oneself"},
    }
    settings = GatewaySettings("http://127.0.0.1:1", port=0, skills=str(tmp_path / "skills"), keys=known)
    with running(settings) as front, httpx2.Client(base_url=front.url, timeout=30) as http:
        for tenant, (key, _) in keys.items():
            for name in ("one.secret", "one.more.secret", "published", "oneself"):
                for which in (name, skills.entry(name).key):
                    body = {
                        "upstream_model": "m",
                        "messages": [{"role": "system", "content": "{a}"}],
                        "skills": {"a": which},
                    }
                    got = http.post("/v1/notebooks", json=body, headers={"x-pkv-key": key})
                    if name in may[tenant]:
                        assert got.status_code == 201, (tenant, name)
                        continue
                    error = got.json()["error"]
                    absent = http.post(
                        "/v1/notebooks", json={**body, "skills": {"a": "absent"}}, headers={"x-pkv-key": key}
                    )
                    assert (got.status_code, error["code"]) == (422, "unknown_skill"), (tenant, name)
                    assert error["message"].replace(which, "absent") == absent.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"skills": {"a": "nothing", "b": "refunds"}}, "unknown_skill"), ({"skills": ["returns"]}, "invalid_request"),
        ({"skills": {"a": 3}}, "invalid_request"), ({"skills": {"c": "returns"}}, "invalid_value"),
        ({"fields": {"a": "x"}}, "invalid_value"), ({"skills": {"a b": "returns"}}, "invalid_value"),
    ],
)  # fmt: skip
def test_what_names_no_skill_is_refused(http: httpx2.Client, change: dict[str, Any], code: str) -> None:
    body = {"upstream_model": "m", "messages": [{"role": "system", "content": HEAD + "{a}{b}"}]}
    got = http.post("/v1/notebooks", json={**body, "skills": {"a": "returns", "b": "refunds"}, **change})
    assert 400 <= got.status_code < 500
    assert got.json()["error"]["code"] == code, got.text


def test_a_gateway_without_a_store_says_how_to_get_one(upstream: RenderingUpstream) -> None:
    with raw_upstream(upstream) as server, running(GatewaySettings(server.url, port=0)) as front:
        body = {"upstream_model": "m", "messages": [{"role": "system", "content": "{a}"}], "skills": {"a": "returns"}}
        got = httpx2.post(f"{front.url}/v1/notebooks", json=body)
    assert (got.status_code, got.json()["error"]["code"]) == (400, "invalid_request")
    assert "--skills" in got.json()["error"]["message"]


def test_what_is_read_is_what_the_store_holds(store: Path, tmp_path: Path) -> None:
    texts, entries = StoredTexts(store), SkillStore(store)
    for name in ("refunds", "returns", "opening"):
        found, entry = texts.find(name, "local"), entries.entry(name)
        assert (found.key, found.text, found.ids) == (entry.key, entry.unit.text, entry.unit.ids)
        assert texts.find(entry.key, "local") == found
    with pytest.raises(UnknownSkillError):
        texts.find("nothing", "local")
    [key] = [entries.entry("refunds").key]
    body = (store / f"{key}.json").read_bytes()
    (tmp_path / f"{key}.json").write_bytes(body.replace(b"ten days", b"six days"))
    with pytest.raises(CorruptFileError):
        StoredTexts(tmp_path).find(key, "local")


def test_names_and_tokens_are_read_without_tensors(store: Path) -> None:
    """The gateway's container has neither torch nor numpy."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'jinja2', 'numpy', 'fsspec', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
        "from programmable_kv.serve.notebooks.stored import StoredTexts\n"
        "import programmable_kv.serve.app\n"
        f"print(len(StoredTexts({str(store)!r}).find('refunds', 'local').ids))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(len(SkillStore(store).entry("refunds").unit.ids))], done.stderr
