"""A server of a test module's `model`, and official clients for it: `pytest_plugins = ["serve.local_clients"]`."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from programmable_kv import Model
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.settings import LocalSettings
from serve.http_peers import Running, running


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    settings = LocalSettings(port=0)
    with running(settings, local_app(model, settings)) as found:
        yield found


@pytest.fixture(scope="module")
def openai_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0)
