"""The sockets of a server, bound before anything else is done: a port in use is told at once."""

from __future__ import annotations

import errno
import os
import socket

from programmable_kv.errors import InvalidArgumentError


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of a host. They refuse connections until a server listens at them.

    Args:
        port: 0 takes a free port.

    Raises:
        InvalidArgumentError: the host has no address on this machine, or the port is in use or needs more rights.
    """
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            place = (address[0], port_of(found) if found else port, *address[2:])
            found.append(_bound(family, kind, protocol, place))
    except OSError as error:
        close(found)
        raise cannot_listen(host, port, error) from error
    return found


def port_of(sockets: list[socket.socket]) -> int:
    """The port that the sockets are bound to."""
    return int(sockets[0].getsockname()[1])


def close(sockets: list[socket.socket]) -> None:
    """Close all of them."""
    for each in sockets:
        each.close()


def cannot_listen(host: str, port: int, error: OSError) -> InvalidArgumentError:
    """The error of a host and port at which no server can listen: why, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return InvalidArgumentError(
            f"port {port} of {host} is in use by another program: stop it, or choose another port with --port"
        )
    mend = "choose port 1024 or higher with --port" if error.errno == errno.EACCES else "check --host and --port"
    return InvalidArgumentError(f"cannot listen on {host}, port {port} ({error.strerror or error}): {mend}")


def _bound(family: int, kind: int, protocol: int, place: tuple[object, ...]) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(place)
    except OSError:
        made.close()
        raise
    return made
