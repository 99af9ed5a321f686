"""What a gateway does with a request beside forwarding it."""

from __future__ import annotations

from enum import StrEnum


class GatewayMode(StrEnum):
    """What is done with a request beside forwarding it."""

    OBSERVE = "observe"
    """compare it with earlier ones, and report"""
    PASS = "pass"
    """nothing"""
    ERRATUM = "erratum"
    """send again what was sent, and tell in an appended line what changed"""
    HOIST = "hoist"
    """the same, with declared values at the end from the first request on"""
    STRICT = "strict"
    """rewrite only what a calibration covers: nothing, as long as there is none"""
