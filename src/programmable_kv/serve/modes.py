"""The modes of a gateway: what it does with a request besides forwarding it."""

from __future__ import annotations

from enum import StrEnum


class GatewayMode(StrEnum):
    """What a gateway does with a request besides forwarding it."""

    OBSERVE = "observe"
    """compare it with earlier ones, and report"""
    PASS = "pass"
    """nothing"""
    ERRATUM = "erratum"
    """send the earlier text again, and state what changed in an appended line"""
    HOIST = "hoist"
    """as `erratum`, and from the first request on declared values stand at the end"""
    STRICT = "strict"
    """rewrite only what a calibration covers; as there is none yet, nothing is rewritten"""

    @property
    def rewrites(self) -> bool:
        """Whether a gateway in this mode changes requests."""
        return self in (GatewayMode.ERRATUM, GatewayMode.HOIST)
