"""A seal: JSON with a digest of its own bytes, so that not one of them can change unnoticed.

The file is `{"sha256": "<digest>", "manifest": <body>}`, byte for byte. The digest is of the body's bytes in the file, not
of what a parser makes of it. A seal finds damage; it is no signature, so what is read is checked against the model as well.
"""

from __future__ import annotations

import hashlib

_START, _MIDDLE, _END = b'{"sha256": "', b'", "manifest": ', b"}\n"
_HEAD = len(_START) + 64 + len(_MIDDLE)


def seal(body: bytes) -> bytes:
    """A JSON document with its digest."""
    return _START + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _END


def opened(sealed: bytes) -> bytes | None:
    """The document that `seal` was given; None if a byte has changed since."""
    body = sealed[_HEAD : -len(_END)]
    return body if seal(body) == sealed else None
