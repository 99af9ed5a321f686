"""The page at `/`: its files, and its use in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.edits.modes import Mode
from programmable_kv.serve.access import ApiKey, new_key
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.settings import GatewaySettings, LocalSettings
from programmable_kv.states import TokenState
from serve.browser import CHROMIUM, DRIVER, chromium
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, running, wait_until
from serve.rewriting_peers import CLOCK, RULES, at, chat

PAGE = Path(__file__).parents[2] / "src/programmable_kv/serve/page"
HOSTILE = "<img src=x onerror=document.title='hit'><script>document.title='hit'</script>"
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)",
    ),
]


def test_the_files_come_with_the_package_and_hold_no_data() -> None:
    with running(GatewaySettings("http://127.0.0.1:1", port=0)) as gateway:
        page = httpx2.get(gateway.url)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for path in ("/pkv/page.css", "/pkv/page.js"):
            assert path in page.text
            assert httpx2.get(gateway.url + path).status_code == 200
        assert "style=" not in page.text, "the policy forbids styles in the page"
        scripts = sorted(path.name for path in PAGE.glob("*.js"))
        assert "notebooks.js" in scripts
        for name in scripts:
            script = httpx2.get(f"{gateway.url}/pkv/{name}")
            assert script.headers["content-type"] == "text/javascript; charset=utf-8"
            assert "innerHTML" not in script.text, "text of prompts is never read as HTML"
        assert httpx2.get(f"{gateway.url}/pkv/miss").json() == {}


def test_every_state_has_a_colour() -> None:
    css = (PAGE / "page.css").read_text(encoding="utf-8")
    assert [state for state in TokenState if f".{state.replace(' ', '-')} {{" not in css] == []


def test_the_page_offers_every_mode_that_changes_something() -> None:
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert [mode for mode in Mode if f"<option>{mode}</option>" not in page] == [Mode.STALE]


def test_a_tenant_s_latest_miss_is_its_own() -> None:
    made = {name: new_key(name) for name in ("one", "two")}
    keys = tuple(ApiKey(name, line.partition(":")[2]) for name, (_, line) in made.items())
    with (
        raw_upstream(CachingUpstream()) as upstream,
        running(GatewaySettings(upstream.url, port=0, keys=keys)) as gateway,
    ):
        headers = {"x-api-key": made["one"][0]}
        for minute in "12":
            httpx2.post(f"{gateway.url}/v1/chat/completions", json=chat(at(minute), "hi"), headers=headers)
        wait_until(lambda: bool(httpx2.get(f"{gateway.url}/pkv/miss", headers=headers).json()))
        found = httpx2.get(f"{gateway.url}/pkv/miss", headers=headers).json()
        assert (found["cause"], found["before"], found["after"]) == ("clock", "Now: 10:01…", "Now: 10:02…")
        assert httpx2.get(f"{gateway.url}/pkv/miss", headers={"x-api-key": made["two"][0]}).json() == {}
        assert httpx2.get(f"{gateway.url}/pkv/miss").status_code == 401
        assert httpx2.get(gateway.url).status_code == 200


def test_tokens_by_state_are_the_whole_text() -> None:
    model = tiny_chat_model(2048)
    settings = LocalSettings(port=0)
    with running(settings, local_app(model, settings)) as server:
        book = made_notebook(server.url)
        before = httpx2.get(f"{server.url}/v1/notebooks/{book['id']}/tokens").json()
        assert set(before["states"]) == {"exact"}
        assert sum(run["tokens"] for run in before["runs"]) == book["tokens"] == before["states"]["exact"]["tokens"]
        edited = httpx2.patch(
            f"{server.url}/v1/notebooks/{book['id']}/fields?mode=field_erratum", json={"status": "shipped"}
        ).json()
        after = httpx2.get(f"{server.url}/v1/notebooks/{book['id']}/tokens").json()
        assert sum(run["tokens"] for run in after["runs"]) == edited["tokens"]
        assert "stale" in after["states"]
        assert any(run["erratum"] for run in after["runs"])
        assert "shipped" in "".join(run["text"] for run in after["runs"])


def made_notebook(url: str, name: str = "pending") -> Any:
    body = {
        "messages": [
            {"role": "system", "content": "Shipped orders cannot be cancelled.\nThe order is {status}.\nSay so."}
        ],
        "fields": {"status": {"value": name, "kind": "text"}},
    }
    got = httpx2.post(f"{url}/v1/notebooks", json=body, timeout=30)
    assert got.status_code == 201, got.text
    return got.json()


class TestInBrowser:
    pytestmark = in_browser

    def test_a_gateway_s_page_shows_what_it_found(self, tmp_path: Path) -> None:
        with (
            raw_upstream(CachingUpstream()) as upstream,
            running(GatewaySettings(upstream.url, port=0, mode=GatewayMode.ERRATUM, rules=CLOCK)) as gateway,
            chromium(tmp_path / "profile") as browser,
        ):
            browser.open(gateway.url)
            browser.wait_for("#routes", "No requests yet.")
            said: list[Any] = ["hi"]
            for turn in range(6):
                body = chat(at(str(turn)), *said, model="claude-sonnet-5-5")
                httpx2.post(f"{gateway.url}/v1/chat/completions", json=body)
                said += ["Yes.", f"more {turn}"]
            for text in ("Be brief.", f"Be thorough. {HOSTILE}"):
                body = chat(RULES + text, "another", "Yes.", "so", model="claude-sonnet-5-5")
                httpx2.post(f"{gateway.url}/v1/chat/completions", json=body)
            browser.wait_for("#totals", "8")
            browser.wait_for("#routes", "/v1/chat/completions")
            browser.wait_for("#rewriting", "announced 1, erratum 5")
            browser.wait_for("#miss", HOSTILE)
            assert browser.text("#miss ins").startswith("thorough")
            assert "USD" in browser.text("#totals")
            assert browser.run("return document.title") == "pkv serve", "text of a prompt is not run"
            assert browser.run("return document.body.scrollWidth <= window.innerWidth")
            assert browser.errors() == []
            browser.picture(tmp_path / "gateway.png")

    def test_a_key_is_asked_for(self, tmp_path: Path) -> None:
        key, line = new_key("one")
        settings = GatewaySettings("http://127.0.0.1:1", port=0, keys=(ApiKey("one", line.partition(":")[2]),))
        with running(settings) as gateway, chromium(tmp_path / "profile") as browser:
            browser.open(gateway.url)
            browser.wait_for("#problem", "API key")
            browser.type("#key", key)
            browser.click("#key-form button")
            browser.wait_for("#about", "mode observe")
            hidden = "return document.querySelector('#problem').hidden && document.querySelector('#key-form').hidden"
            wait_until(lambda: bool(browser.run(hidden)))

    def test_a_field_is_edited_in_the_page(self, tmp_path: Path) -> None:
        model = tiny_chat_model(2048)
        settings = LocalSettings(port=0)
        with running(settings, local_app(model, settings)) as server, chromium(tmp_path / "profile") as browser:
            book = made_notebook(server.url, HOSTILE.replace("<script>", "").replace("</script>", ""))
            browser.open(server.url)
            browser.wait_for("#notebooks", book["id"])
            browser.click("#notebooks button")
            browser.wait_for("#tokens", "Shipped orders cannot be cancelled.")
            browser.wait_for("#legend", "exact")
            browser.type("#field-status", "shipped")
            browser.run("document.querySelector('#mode').value = 'field_erratum'")
            browser.click("#edit")
            browser.wait_for("#account", "tokens computed")
            browser.wait_for("#notebook-name", "version 2")
            browser.wait_for("#legend", "stale")
            found = httpx2.get(f"{server.url}/v1/notebooks/{book['id']}").json()
            assert (found["fields"], found["version"]) == ({"status": "shipped"}, 2)
            colours = browser.run(
                "return [...new Set([...document.querySelectorAll('#tokens span')]"
                ".map((span) => getComputedStyle(span).backgroundColor))].length"
            )
            assert colours > 1, "tokens are coloured by state"
            browser.picture(tmp_path / "local.png")
            httpx2.patch(f"{server.url}/v1/notebooks/{book['id']}/fields", json={"status": "returned"})
            browser.wait_for("#notebook-name", "version 3")
            wait_until(lambda: browser.text("#account") == "")
            assert browser.run("return document.querySelector('#field-status').value") == "returned"
            assert browser.run("return document.title") == "pkv serve"
            assert browser.errors() == []

    def test_a_notebook_of_an_upstream_is_edited_and_deleted_in_the_page(self, tmp_path: Path) -> None:
        upstream_script = CachingUpstream()
        hostile = HOSTILE.replace("<script>", "").replace("</script>", "")
        with (
            raw_upstream(upstream_script) as upstream,
            running(GatewaySettings(upstream.url, port=0)) as gateway,
            chromium(tmp_path / "profile") as browser,
            httpx2.Client(base_url=gateway.url, timeout=30) as http,
        ):
            browser.open(gateway.url)
            browser.wait_for("#notebooks", "None yet")
            book = gateway_notebook(http, hostile)
            other = gateway_notebook(http, "someone")
            browser.wait_for("#notebooks", f"{other} (the-model)")
            browser.click("#notebooks button")
            browser.wait_for("#notebook-name", f"notebook:{book}, version 1")
            assert "number, at least 0, at most 500" in browser.text("#values")
            kinds = "return [...document.querySelectorAll('#values > :not(label)')].map((each) => each.type)"
            assert browser.run(kinds) == ["select-one", "text", "date", "textarea", "textarea", "text", "select-one"]
            assert browser.value("#field-customer") == hostile
            assert "coloured by state on a local server only" in browser.text("#notebook")
            assert browser.run("return document.querySelector('#tokens').checkVisibility()") is False
            modes = "return [...document.querySelectorAll('#mode option')].map((each) => each.value)"
            assert browser.run(modes) == ["", "erratum", "full"]

            browser.type("#field-amount", "501")
            browser.click("#edit")
            browser.wait_for("#account", "the value of amount must be at most 500; got 501")
            assert http.get(f"/v1/notebooks/{book}").json()["version"] == 1

            browser.choose("#field-status", "shipped")
            browser.type("#field-amount", "31")
            browser.type("#field-todo", "call back\nwrite")
            browser.type("#field-record", '{"id": 12345678901234567890, "tags": ["a"]}')
            browser.click("#edit")
            browser.wait_for("#account", "erratum: a line of ")
            browser.wait_for("#notebook-name", "version 2")
            found = http.get(f"/v1/notebooks/{book}").json()["fields"]
            assert found == {
                "status": "shipped", "amount": "31", "due": "2026-11-26", "todo": "call back\nwrite",
                "record": '{"id": 12345678901234567890, "tags": ["a"]}', "customer": hostile, "paid": "false",
            }  # fmt: skip

            browser.type("#field-record", "{")
            browser.click("#edit")
            browser.wait_for("#account", "the value of record is not valid JSON")
            browser.type("#field-record", '{"id": 1}')
            browser.choose("#mode", "full")
            browser.click("#edit")
            browser.wait_for("#account", "full: a new conversation begins with the latest values")
            asked = {"model": f"notebook:{book}", "messages": [{"role": "user", "content": "and?"}]}
            assert http.post("/v1/chat/completions", json=asked).status_code == 200
            assert "The order is shipped, 31 euros" in upstream_script.bodies[-1]["messages"][0]["content"]
            browser.wait_for("#usage", "1 requests since this gateway started")

            assert http.patch(f"/v1/notebooks/{book}/fields", json={"paid": True}).status_code == 200
            browser.choose("#field-status", "pending")
            browser.click("#edit")
            browser.wait_for("#account", "the notebook is now at version 4: read it again, then decide")
            browser.wait_for("#notebook-name", "version 4")
            assert browser.value("#field-paid") == "true"
            assert browser.value("#field-status") == "shipped", "what the notebook holds, not what was refused"
            browser.picture(tmp_path / "notebook.png")

            browser.click("#delete")
            assert browser.text("#delete") == "Delete it for good"
            assert http.get(f"/v1/notebooks/{book}").status_code == 200, "one click deletes nothing"
            browser.click("#delete")
            wait_until(lambda: book not in browser.text("#notebooks"))
            assert [each["id"] for each in http.get("/v1/notebooks").json()["data"]] == [other]
            assert browser.run("return document.querySelector('#notebook').hidden")
            assert browser.run("return document.title") == "pkv serve", "a value is not run"
            errors = [error for error in browser.errors() if "status of 4" not in error]
            assert errors == []


def gateway_notebook(http: httpx2.Client, customer: str) -> str:
    """Create a notebook with one field of every kind that the page shows in its own way. Returns the id."""
    text = "The order is {status}, {amount} euros, due {due}.\nTodo:\n{todo}\nRecord: {record}\nFor {customer}. Paid: {paid}."
    fields = {
        "status": {"value": "pending", "kind": "enum", "among": ["pending", "shipped"]},
        "amount": {"value": 30, "at_least": 0, "at_most": 500},
        "due": {"value": "2026-11-26", "kind": "date"},
        "todo": {"value": "call\nwrite", "kind": "block"},
        "record": {"value": {"id": 1}, "kind": "json"},
        "customer": customer,
        "paid": False,
    }
    messages = [{"role": "system", "content": RULES + text}]
    got = http.post("/v1/notebooks", json={"upstream_model": "the-model", "messages": messages, "fields": fields})
    assert got.status_code == 201, got.text
    return str(got.json()["id"])
