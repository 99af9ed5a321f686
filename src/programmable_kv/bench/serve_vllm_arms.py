"""The arms of the bench on a real vLLM: the places where a client can put its clock, and the resulting requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from programmable_kv.bench.vllm_cases import TOPICS
from programmable_kv.bench.vllm_server import SERVED

IN_PREFIX = "in the prefix"
"""The clock is at the top of the system prompt, as many clients write it."""
APPENDED = "appended by the client"
"""The clock is at the end of each user message and stays there: a client that has been fixed."""
BY_HAND = "hoisted by hand"
"""The clock is at the end of the newest message only, and earlier messages lose theirs: the usual advice, "put what
changes last"."""
GATEWAY = "gateway: "
MODES = ("erratum", "hoist")
"""Modes of a gateway in front of a client with its clock in the prefix. To add a mode, add its name here."""
ARMS = (IN_PREFIX, APPENDED, BY_HAND, *(f"{GATEWAY}{mode}" for mode in MODES))
SHORT = {IN_PREFIX: "in", APPENDED: "appended", BY_HAND: "by_hand", **{f"{GATEWAY}{mode}": mode for mode in MODES}}
"""The names of the arms in a record's summary."""
TURNS = 4
ANSWER_TOKENS = 8


def mode_of(arm: str) -> str:
    """The gateway's mode in an arm; empty if the arm has no gateway."""
    return arm.removeprefix(GATEWAY) if arm.startswith(GATEWAY) else ""


def body(arm: str, policy: str, session: int, clocks: Sequence[int], salt: str) -> dict[str, Any]:
    """One request: a turn of a conversation, with the messages before it.

    Args:
        policy: the system prompt without the clock.
        session: the conversation's number.
        clocks: the minute of each turn so far, the newest last.
        salt: the cache salt that separates the arm's cache from the others'.
    """
    times = [f"Now: {minute // 60 % 24:02}:{minute % 60:02}" for minute in clocks]
    in_prompt = arm not in (APPENDED, BY_HAND)
    messages = [{"role": "system", "content": f"{times[-1]}\n{policy}" if in_prompt else policy}]
    newest = len(times) - 1
    for number, time in enumerate(times):
        topic = TOPICS[(session + number) % len(TOPICS)]
        asked = f"Customer {session}, {topic}, kind {number + 1}: which desk?"
        with_time = arm == APPENDED or (arm == BY_HAND and number == newest)
        messages.append({"role": "user", "content": f"{asked}\n{time}" if with_time else asked})
        if number < newest:
            messages.append({"role": "assistant", "content": "The one in the policy."})
    return {
        "model": SERVED, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0, "cache_salt": salt,
        "messages": messages,
    }  # fmt: skip
