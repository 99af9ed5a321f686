"""A seal: JSON with a digest of its own bytes, so that a change of any byte is detected.

The file is exactly `{"sha256": "<digest>", "manifest": <body>}`. The digest covers the body's bytes in the file, not
the parsed content. A seal detects damage; it is not a signature, so the content is checked against the model as well.
"""

from __future__ import annotations

import hashlib

_START, _MIDDLE, _END = b'{"sha256": "', b'", "manifest": ', b"}\n"
_HEAD = len(_START) + 64 + len(_MIDDLE)


def seal(body: bytes) -> bytes:
    """A JSON document with its digest."""
    return _START + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _END


def opened(sealed: bytes) -> bytes | None:
    """The document that was passed to `seal`; None if a byte has changed since."""
    body = sealed[_HEAD : -len(_END)]
    return body if seal(body) == sealed else None
