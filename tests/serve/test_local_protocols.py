"""The local server in its four protocols, through the openai and anthropic clients. The oracle is the library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from programmable_kv import Model, Notebook
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import ContextOverflowError
from programmable_kv.serve.local.server import FORMS
from serve.http_peers import Running

pytest_plugins = ["serve.local_clients"]
SYSTEM = "The order is {status}. Shipped orders stay."
SAID = [
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "Sure?"},
]
GREEDY: Any = {"temperature": 0}
"""Extra members of the body, because the anthropic client has no parameter for the temperature."""
LEAST = {
    "/v1/chat/completions": {"messages": SAID, "max_tokens": 4},
    "/v1/completions": {"prompt": "Is it so?", "max_tokens": 4},
    "/v1/responses": {"input": "Is it so?", "max_output_tokens": 4},
    "/v1/messages": {"messages": SAID, "max_tokens": 4},
}
"""protocol's path -> members of a valid request"""


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_chat_model(1024)


@pytest.fixture(scope="module")
def book(server: Running) -> dict[str, Any]:
    body = {"messages": [{"role": "system", "content": SYSTEM}], "fields": {"status": "pending"}}
    return httpx2.post(f"{server.url}/v1/notebooks", json=body, timeout=30).json()  # type: ignore[no-any-return]


def library_s(model: Model, messages: list[Any], tokens: int = 8) -> tuple[str, int]:
    notebook = Notebook.from_messages(model, messages)
    notebook.prefill()
    return "".join(notebook.generate(max_new_tokens=tokens)), len(notebook)


def behind(model: Model, said: list[Any], tokens: int = 8) -> tuple[str, int, int]:
    """The oracle for messages after the notebook: the answer's text, the prompt's tokens, and the cached tokens."""
    notebook = Notebook.from_messages(model, [{"role": "system", "content": SYSTEM}], fields={"status": "pending"})
    notebook.prefill()
    cached = len(notebook)
    for message in said:
        notebook.add(message["role"], message["content"])
    return "".join(notebook.generate(max_new_tokens=tokens)), len(notebook), cached


def test_responses_says_what_the_library_says(openai_client: openai.OpenAI, model: Model) -> None:
    expected, prompt = library_s(model, [{"role": "system", "content": "A rule."}, *SAID])
    given: Any = SAID
    got = openai_client.responses.create(
        model=model.name, instructions="A rule.", input=given, temperature=0, max_output_tokens=8
    )
    assert got.output_text == expected
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert got.usage is not None
    assert (got.usage.input_tokens, got.usage.input_tokens_details.cached_tokens) == (prompt, 0)
    assert got.usage.total_tokens == prompt + got.usage.output_tokens
    assert got.instructions == "A rule."


def test_responses_streams_its_events_in_order(openai_client: openai.OpenAI, model: Model) -> None:
    expected, prompt = library_s(model, [{"role": "user", "content": "Is it so?"}])
    events = list(
        openai_client.responses.create(
            model=model.name, input="Is it so?", temperature=0, max_output_tokens=8, stream=True
        )
    )
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    last = events[-1].response  # type: ignore[union-attr]
    assert last.output_text == expected
    assert last.usage is not None
    assert last.usage.input_tokens == prompt


def test_responses_behind_a_notebook(openai_client: openai.OpenAI, model: Model, book: dict[str, Any]) -> None:
    expected, prompt, cached = behind(model, SAID)
    given: Any = SAID
    got = openai_client.responses.create(model=book["model"], input=given, temperature=0, max_output_tokens=8)
    assert got.output_text == expected
    assert got.usage is not None
    assert (got.usage.input_tokens, got.usage.input_tokens_details.cached_tokens) == (prompt, cached)


def test_messages_says_what_the_library_says(claude: anthropic.Anthropic, model: Model) -> None:
    expected, prompt = library_s(model, [{"role": "system", "content": "A rule.\nAnother."}, *SAID])
    system: Any = [
        {"type": "text", "text": "A rule.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Another."},
    ]
    given: Any = SAID
    got = claude.messages.create(model=model.name, max_tokens=8, system=system, messages=given, extra_body=GREEDY)
    assert [block.text for block in got.content] == [expected]  # type: ignore[union-attr]
    assert (got.stop_reason, got.stop_sequence) == ("max_tokens", None)
    assert (got.usage.input_tokens, got.usage.cache_read_input_tokens) == (prompt, 0)


def test_messages_streams_the_same(claude: anthropic.Anthropic, model: Model) -> None:
    expected, prompt = library_s(model, SAID)
    given: Any = SAID
    kinds = []
    with claude.messages.stream(model=model.name, max_tokens=8, messages=given, extra_body=GREEDY) as stream:
        for event in stream:
            kinds.append(event.type)
        got = stream.get_final_message()
    assert [block.text for block in got.content] == [expected]  # type: ignore[union-attr]
    assert (got.stop_reason, got.usage.input_tokens) == ("max_tokens", prompt)
    assert got.usage.output_tokens > 0
    plain = [kind for kind in kinds if kind not in ("content_block_delta", "text")]
    assert plain == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


def test_messages_behind_a_notebook(claude: anthropic.Anthropic, model: Model, book: dict[str, Any]) -> None:
    expected, prompt, cached = behind(model, SAID)
    given: Any = SAID
    got = claude.messages.create(model=book["model"], max_tokens=8, messages=given, extra_body=GREEDY)
    assert [block.text for block in got.content] == [expected]  # type: ignore[union-attr]
    assert got.usage.cache_read_input_tokens == cached
    assert got.usage.input_tokens == prompt - cached, "in this protocol cached tokens are no part of the input's"


def test_messages_names_the_stop_sequence(claude: anthropic.Anthropic, model: Model) -> None:
    expected, _ = library_s(model, SAID)
    stop = expected[3:5]
    given: Any = SAID
    got = claude.messages.create(
        model=model.name, max_tokens=8, messages=given, extra_body=GREEDY, stop_sequences=["never said", stop]
    )
    assert [block.text for block in got.content] == [expected.partition(stop)[0]]  # type: ignore[union-attr]
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stop)


def test_completions_continues_raw_text(openai_client: openai.OpenAI, model: Model) -> None:
    prompt = "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"
    expected, tokens = library_s(model, [{"role": "user", "content": "Is it so?"}])
    got = openai_client.completions.create(model=model.name, prompt=prompt, max_tokens=8, temperature=0)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (expected, "length"), "markers in it are markers"
    assert got.usage is not None
    assert got.usage.prompt_tokens > tokens, "the opening of the answer is a part of it"
    parts = list(
        openai_client.completions.create(
            model=model.name,
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected
    assert parts[-1].usage == got.usage


def test_both_clients_list_the_model(openai_client: openai.OpenAI, claude: anthropic.Anthropic, model: Model) -> None:
    assert (
        [each.id for each in claude.models.list()] == [each.id for each in openai_client.models.list()] == [model.name]
    )
    assert openai_client.models.retrieve(model.name).id == claude.models.retrieve(model.name).id == model.name
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("gpt-9")


def test_log_probabilities_are_the_model_s(openai_client: openai.OpenAI, model: Model) -> None:
    told: list[tuple[int, float, list[float]]] = []
    notebook = Notebook.from_messages(model, SAID)
    notebook.prefill()

    def watch(token: int, shares: Any) -> None:
        assert math.isclose(float(shares.exp().sum()), 1, abs_tol=1e-4)
        told.append((token, float(shares[token]), shares.topk(3).values.tolist()))

    options = {"temperature": 0.8, "seed": 3}
    text = "".join(notebook.generate(max_new_tokens=6, watch=watch, **options))  # type: ignore[arg-type]
    got = openai_client.chat.completions.create(  # type: ignore[call-overload]
        model=model.name, messages=SAID, max_tokens=6, logprobs=True, top_logprobs=3, **options
    )
    shares = got.choices[0].logprobs.content
    assert got.choices[0].message.content == text
    assert [each.logprob for each in shares] == [share for _, share, _ in told]
    assert [[top.logprob for top in each.top_logprobs] for each in shares] == [tops for _, _, tops in told]
    assert bytes(byte for each in shares for byte in each.bytes).decode() == text
    parts = openai_client.chat.completions.create(  # type: ignore[call-overload]
        model=model.name, messages=SAID, max_tokens=6, logprobs=True, top_logprobs=3, stream=True, **options
    )
    streamed = [each for part in parts if part.choices[0].logprobs for each in part.choices[0].logprobs.content]
    assert streamed == shares


def test_every_protocol_that_has_them_tells_the_same(openai_client: openai.OpenAI, model: Model) -> None:
    ask: Any = {"model": model.name, "temperature": 0}
    said: Any = [{"role": "user", "content": "Is it so?"}]
    chat = openai_client.chat.completions.create(**ask, messages=said, max_tokens=5, logprobs=True, top_logprobs=2)
    expected = [(each.token, each.logprob) for each in chat.choices[0].logprobs.content]
    include: Any = ["message.output_text.logprobs"]
    response = openai_client.responses.create(**ask, input=said, max_output_tokens=5, include=include, top_logprobs=2)
    shares = response.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert [(each.token, each.logprob) for each in shares] == expected
    prompt = "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"
    raw = openai_client.completions.create(**ask, prompt=prompt, max_tokens=5, logprobs=2).choices[0]
    assert raw.logprobs is not None
    assert list(zip(raw.logprobs.tokens or [], raw.logprobs.token_logprobs or [], strict=True)) == expected
    assert raw.logprobs.text_offset == [len("".join(t for t, _ in expected[:n])) for n in range(len(expected))]


REFUSED = [
    ("/v1/responses", {"previous_response_id": "r"}), ("/v1/responses", {"store": True}), ("/v1/responses", {"a_new_one": 1}),
    ("/v1/responses", {"input": [{"type": "reasoning"}]}), ("/v1/responses", {"input": []}), ("/v1/responses", {"input": 3}),
    ("/v1/responses", {"tools": [{"type": "web_search"}]}), ("/v1/responses", {"top_logprobs": 21}),
    ("/v1/responses", {"include": ["reasoning.encrypted_content"]}), ("/v1/responses", {"reasoning": {"effort": "high"}}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
    ("/v1/responses", {"text": {"format": {"type": "json_object"}}}), ("/v1/responses", {"instructions": 3}),
    ("/v1/messages", {"max_tokens": None}), ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 9}}),
    ("/v1/messages", {"messages": [{"role": "system", "content": "x"}]}), ("/v1/messages", {"messages": []}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}), ("/v1/messages", {"system": 3}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "x", "input": {}}]}]}),
    ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), ("/v1/messages", {"a_new_one": 1}),
    ("/v1/messages", {"tool_choice": {"type": "any"}}), ("/v1/messages", {"stop_sequences": [3]}),
    ("/v1/completions", {"prompt": ["a", "b"]}), ("/v1/completions", {"prompt": ""}), ("/v1/completions", {"echo": True}),
    ("/v1/completions", {"prompt": [1, 2]}), ("/v1/completions", {"logprobs": 6}), ("/v1/completions", {"n": 2}),
    ("/v1/completions", {"model": "notebook:nb_x"}),
    ("/v1/chat/completions", {"top_logprobs": 2}), ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}),
    ("/v1/chat/completions", {"tool_choice": "required"}), ("/v1/chat/completions", {"functions": [{}]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change"), REFUSED, ids=[f"{path} {change}"[:90] for path, change in REFUSED])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_supported_is_refused(
    server: Running, model: Model, path: str, change: dict[str, Any], stream: bool
) -> None:
    body = {"model": model.name, **LEAST[path], "stream": stream}
    assert httpx2.post(f"{server.url}{path}", json=body, timeout=30).status_code == 200
    got = httpx2.post(f"{server.url}{path}", json={**body, **change}, timeout=30)
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert error["message"]
    if path == "/v1/messages":
        assert got.json()["type"] == "error"
        assert error["type"] == "invalid_request_error"
        assert got.json()["code"] in ("unsupported_parameter", "invalid_request", "invalid_argument", "invalid_value")
    else:
        assert error["code"] in ("unsupported_parameter", "invalid_request", "invalid_argument", "invalid_value")


@pytest.mark.parametrize("path", FORMS)
def test_a_model_that_is_not_there(server: Running, path: str) -> None:
    got = httpx2.post(f"{server.url}{path}", json={**LEAST[path], "model": "gpt-9"}, timeout=30)
    assert got.status_code == 404
    kind = got.json()["error"]["type"]
    assert kind == ("not_found_error" if path == "/v1/messages" else "invalid_request_error")


def test_clients_raise_their_own_errors(
    openai_client: openai.OpenAI, claude: anthropic.Anthropic, model: Model
) -> None:
    long: Any = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(anthropic.BadRequestError, match="positions"):
        claude.messages.create(model=model.name, max_tokens=4, messages=long)
    with pytest.raises(openai.BadRequestError, match="positions") as found:
        openai_client.responses.create(model=model.name, input=long)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="notebook:nb_none", max_tokens=4, messages=[{"role": "user", "content": "so"}])


@pytest.mark.parametrize("path", FORMS)
def test_a_full_context_ends_a_stream_with_the_protocol_s_error(
    server: Running, model: Model, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflows(*_: Any, **__: Any) -> Iterator[str]:
        yield "a"
        raise ContextOverflowError("no room")

    monkeypatch.setattr(Notebook, "generate", overflows)
    body = {"model": model.name, **LEAST[path], "stream": True}
    got = httpx2.post(f"{server.url}{path}", json=body, timeout=30).text
    assert "no room" in got
    assert "context_length_exceeded" in got
    assert ("event: error" in got) == (path in ("/v1/responses", "/v1/messages"))
    assert "[DONE]" not in got


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "max_tokens"), ("/v1/chat/completions", "max_completion_tokens"),
        ("/v1/completions", "max_tokens"), ("/v1/responses", "max_output_tokens"), ("/v1/messages", "max_tokens"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_a_bad_limit_is_named_as_the_client_named_it(
    server: Running, model: Model, path: str, name: str, value: Any
) -> None:
    body = {key: each for key, each in LEAST[path].items() if not key.startswith("max_")}
    got = httpx2.post(server.url + path, json={**body, "model": model.name, name: value})
    assert got.status_code == 400
    message = got.json()["error"]["message"]
    assert message.startswith(f"{name} must be a whole number")
    assert "max_new_tokens" not in message


@pytest.mark.parametrize(("path", "name"), [("/v1/completions", "stop"), ("/v1/messages", "stop_sequences")])
@pytest.mark.parametrize("value", [[""], [3], 3])
def test_a_bad_stop_string_is_named_as_the_client_named_it(
    server: Running, model: Model, path: str, name: str, value: Any
) -> None:
    got = httpx2.post(server.url + path, json={**LEAST[path], "model": model.name, name: value})
    assert got.status_code == 400
    assert got.json()["error"]["message"].startswith(f"{name} must be a text or a list of texts")
