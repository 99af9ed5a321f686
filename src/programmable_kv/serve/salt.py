"""A salt for each tenant, so that no tenant can measure by timing what its prompts share with another tenant's."""

from __future__ import annotations

import hmac
import json
import secrets
from hashlib import sha256

from programmable_kv.serve.refusal import Refusal, RefusedError
from programmable_kv.serve.rewriting.body import Spot, read
from programmable_kv.serve.state import State
from programmable_kv.vllm_plugin.marks import SALT_PREFIX

_NAME = "cache_salt"
_SECRET = "salt"
_UNREADABLE = Refusal(
    400,
    "unreadable_body",
    "this gateway salts prompts: the body must be an uncompressed JSON object in UTF-8 without repeated names",
)


class TenantSalt:
    """Puts vLLM's `cache_salt` into request bodies."""

    def __init__(self, secret: bytes) -> None:
        """
        Args:
            secret: the salts are derived from it. With another secret, nothing that is cached now is found again.
        """
        self._secret = secret

    def of(self, tenant: str, own: str = "") -> str:
        """The salt of a tenant, and of the client's own salt within it. Lengths before the parts keep pairs apart.

        A salt of prompts with skills stays one: vLLM's plugin knows it by how it begins.
        """
        parts = [part.encode("utf-8", "surrogatepass") for part in (tenant, own)]
        message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        derived = hmac.digest(self._secret, message, sha256).hex()
        return f"{SALT_PREFIX}{derived}" if own.startswith(SALT_PREFIX) else derived

    def salted(self, data: bytes, tenant: str, *, packed: bool) -> bytes:
        """A body with the tenant's salt. Everything else stays byte for byte.

        Raises:
            RefusedError: it cannot be read, so that what it asks for would not be parted from other tenants'.
        """
        body = None if packed else read(data)
        if body is None:
            raise RefusedError(_UNREADABLE)
        own = body.data.get(_NAME)
        salt = json.dumps(self.of(tenant, own if isinstance(own, str) else json.dumps(own) if own is not None else ""))
        if _NAME in body.spots:
            return body.spliced([(body.spots[_NAME], salt)])
        start = body.text.index("{") + 1
        return body.spliced([(Spot(start, start), f'"{_NAME}":{salt},')])


def secret_of(state: State) -> bytes:
    """The secret in a state, made where there is none."""
    with state.write() as run:
        run.execute(
            "INSERT INTO secrets VALUES (?, ?) ON CONFLICT (name) DO NOTHING", (_SECRET, secrets.token_bytes(32))
        )
        [(found,)] = run.execute("SELECT value FROM secrets WHERE name = ?", (_SECRET,)).fetchall()
    return bytes(found)
