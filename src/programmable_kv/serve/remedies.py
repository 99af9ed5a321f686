"""What a gateway could do about a miss, by the class of its cause. It says so; it does not do it."""

from __future__ import annotations

from enum import StrEnum


class Remedy(StrEnum):
    """What would keep the prefix."""

    NONE = "none"
    """nothing that leaves the meaning of the request alone"""
    ERRATUM = "erratum"
    """send the earlier text again, and append one line with the new value"""
    RESEND = "resend"
    """send the same content in its earlier form or order"""


REMEDIES = {
    "clock": Remedy.ERRATUM,
    "id": Remedy.ERRATUM,
    "counter": Remedy.ERRATUM,
    "file list": Remedy.ERRATUM,
    "state block": Remedy.ERRATUM,
    "client header": Remedy.RESEND,
    "tools reordered": Remedy.RESEND,
    "serialisation flip": Remedy.RESEND,
    "rolling cache_control": Remedy.RESEND,
}
"""class of cause -> what would keep the prefix; classes that are not here have no remedy in a gateway"""


def remedy_of(cause: str) -> Remedy:
    """The remedy for a class of causes."""
    return REMEDIES.get(cause, Remedy.NONE)
