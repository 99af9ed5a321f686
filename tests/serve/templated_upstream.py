"""An upstream that renders a real chat template with transformers, to show where a line is in the model's input."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from programmable_kv.bench.tiny_chat import tiny_chat_model
from serve.caching_upstream import CachingUpstream
from serve.http_peers import Received, answer

TEMPLATES = Path(__file__).parents[1] / "templates"


@cache
def _tokenizer() -> Any:
    return tiny_chat_model(1024).tokenizer


class TemplatedUpstream(CachingUpstream):
    """Renders Chat Completions like vLLM, at `/tokenize`, or like llama-server, at `/apply-template`."""

    def __init__(self, family: str, *, like: str = "vllm", **more: Any) -> None:
        super().__init__(**more)
        self.tokenizer = copy.copy(_tokenizer())
        self.tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
        self.like = like

    def render(self, body: Any) -> str:
        """The text that the model reads. As in servers, the template gets the arguments of tool calls as data.

        Raises:
            Exception: the template refuses the conversation.
        """
        messages = json.loads(json.dumps(body["messages"]))
        for message in messages:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tools=body.get("tools"),
            tokenize=False,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        return text

    def rendering(self, request: Received) -> list[bytes]:
        """See `CachingUpstream.rendering`."""
        status, found = self.told(request.target.decode(), request.json)
        return [answer(json.dumps(found).encode(), f"{status} Told")]

    def told(self, path: str, body: Any) -> tuple[int, Any]:
        """The answer to a request to render."""
        if self.like == "vllm" and path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        if self.like == "llama-server" and path == "/tokenize":
            return 200, {"tokens": []}  # llama-server tokenizes the member `content`, which this body does not have
        if path != {"vllm": "/tokenize", "llama-server": "/apply-template"}.get(self.like):
            return 404, {"detail": "Not Found"}
        try:
            text = self.render(body)
        except Exception as error:
            return (400 if self.like == "vllm" else 500), {"error": {"message": str(error)}}
        if self.like == "llama-server":
            return 200, {"prompt": text}
        return 200, {"tokens": self.tokenizer(text, add_special_tokens=False)["input_ids"]}

    async def ask(self, path: str, data: bytes) -> tuple[int, bytes]:
        """Answer a request of the gateway's own, without sockets."""
        status, found = self.told(path, json.loads(data))
        return status, json.dumps(found).encode()
