"""Why there is no connection to an upstream, in words for clients and the log. They hold no address and no key."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import replace

from programmable_kv.serve.refusal import UPSTREAM_BROKEN, UPSTREAM_UNREACHABLE, Refusal


def not_connected(error: OSError) -> Refusal:
    """The refusal where no connection could be made."""
    return replace(UPSTREAM_UNREACHABLE, message=f"cannot connect to the upstream: {_why(error)}")


def broken_off(error: Exception | None) -> Refusal:
    """The refusal where a connection ended before there was an answer.

    Args:
        error: why it ended, where that is known.
    """
    if not isinstance(error, ssl.SSLError):
        return UPSTREAM_BROKEN
    return replace(
        UPSTREAM_BROKEN,
        message=f"the upstream ended the TLS connection ({_of_tls(error)}): does it require a client certificate?",
    )


def _why(error: OSError) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            found = error.verify_message.partition(",")[0]  # behind it stands the address
            return (
                f"its TLS certificate is not accepted ({found}). Make the gateway trust its issuer (SSL_CERT_FILE), or give "
                "the address that it was issued for"
            )
        case ssl.SSLError():
            return f"TLS failed ({_of_tls(error)}). Does its address serve https?"
        case TimeoutError():
            return "it did not answer in time. Is its address right, and is it running?"
        case socket.gaierror():
            return "the host name in its address is unknown. Is it right?"
        case ConnectionRefusedError():
            return "the connection was refused. Is it running?"
    known = os.strerror(error.errno) if error.errno else "none of its addresses accepts a connection"
    return f"{known}. Is it running?"


def _of_tls(error: ssl.SSLError) -> str:
    """What the TLS library calls it."""
    return (error.reason or type(error).__name__).lower().replace("_", " ")
