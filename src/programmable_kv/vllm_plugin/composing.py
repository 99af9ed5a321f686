"""Composes a prompt from token ids and stored skills, and the requests that send it. Uses no model and no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.storage.manifests import Entry
from programmable_kv.vllm_plugin.marks import SALT_PREFIX, Mark, Marks
from programmable_kv.vllm_plugin.matching import Placed, stages

_LONGEST_SALT = 128
_FORBIDDEN = frozenset("@/\\\0")
"""the maximum length and the forbidden characters of a cache salt in vLLM 0.32"""


@dataclass(frozen=True, slots=True)
class Composition:
    """A prompt's token ids, and the skills in it."""

    ids: tuple[int, ...]
    placed: tuple[Placed, ...]

    @classmethod
    def of(cls, parts: Sequence[Entry | Sequence[int]], *, seam: int = 0) -> Composition:
        """Compose a prompt from its parts in order: text as token ids, and skills as entries of a store.

        Args:
            seam: how many of a skill's first tokens vLLM computes itself, unless the skill begins the prompt.
        """
        ids: list[int] = []
        placed: list[Placed] = []
        for part in parts:
            own = part.unit.ids if isinstance(part, Entry) else tuple(part)
            if isinstance(part, Entry):
                placed.append(Placed(part.key, Span(len(ids), len(ids) + len(own)), seam if ids else 0))
            ids += own
        return cls(tuple(ids), tuple(placed))

    def requests(self, salt: str, block_size: int) -> list[dict[str, Any]]:
        """Return the requests to send to `/v1/completions` one after the other; the last one is the whole prompt.

        The earlier requests compute the text between skills and the seams, so that every skill can be loaded. Their answers
        are not wanted, so they have `max_tokens=1`. All requests have the same salt. Adjacent skills without a seam need no
        earlier request.

        Args:
            salt: names those whose prompts may share cached blocks: a tenant, a conversation.
            block_size: block size of vLLM's cache, in tokens.

        Raises:
            InvalidArgumentError: the block size is less than 1, or vLLM does not accept the salt.
        """
        if block_size < 1:
            raise InvalidArgumentError(f"block_size must be at least 1 token, got {block_size}")
        if not salt or len(SALT_PREFIX + salt) > _LONGEST_SALT or _FORBIDDEN.intersection(salt):
            longest = _LONGEST_SALT - len(SALT_PREFIX)
            raise InvalidArgumentError(
                f"a salt must have 1 to {longest} characters, and no '@', '/', '\\' or NUL; got {salt[:60]!r}"
            )
        seam = max((each.seam for each in self.placed), default=0)
        sent = []
        for length in stages(self.placed, len(self.ids), block_size):
            within = [each for each in self.placed if each.tokens.stop <= length]
            body: dict[str, Any] = {"prompt": list(self.ids[:length]), "cache_salt": f"{SALT_PREFIX}{salt}"}
            if within:
                marks = Marks(tuple(Mark(each.key, each.tokens.start) for each in within), seam)
                body["kv_transfer_params"] = marks.parameters
            sent.append(body | ({"max_tokens": 1} if length < len(self.ids) else {}))
        return sent
