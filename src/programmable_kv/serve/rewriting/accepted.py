"""What an upstream takes from a gateway that rewrites, for each route and model: found out by trying, and remembered."""

from __future__ import annotations

import json
import logging

from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.plan import FORMS
from programmable_kv.serve.rewriting.verdicts import Verdicts

_LOG = logging.getLogger("programmable_kv.serve")
_OFF = "off"
_OFF_S = 86400.0
_STRIKES = 3
"""refused announcements after which none is tried: one may have been too long for the model's context"""
_REFUSED = ("refused", "folded")
_TAKEN = "taken"
"""not refused; whether it is folded into the head is not known yet"""


class Accepted:
    """For several threads."""

    def __init__(self, verdicts: Verdicts, upstream: str) -> None:
        """
        Args:
            upstream: its address, under which is remembered what it takes.
        """
        self._verdicts = verdicts
        self._upstream = upstream
        self._strikes: dict[tuple[str, str], int] = {}
        """route and model -> announcements that were refused"""

    def forms(self, route: str, model: str) -> list[Form] | None:
        """The forms in which a line may stand, the best first; None where rewriting is switched off."""
        found = self._verdicts.of(self._subject(route, model))
        if _OFF in found:
            return None
        return [form for form in FORMS[route] if found.get(_about(form)) not in _REFUSED]

    def verdict(self, route: str, model: str, form: Form) -> str:
        """What was found out about a form; empty where nothing was."""
        return self._verdicts.of(self._subject(route, model)).get(_about(form), "")

    def is_proven(self, route: str, model: str, form: Form) -> bool:
        """Whether the upstream took a line in this form before."""
        return self.verdict(route, model, form) in (_TAKEN, "accepted")

    def decide(self, route: str, model: str, form: Form, verdict: str) -> None:
        """Remember what was found out about a form: `refused`, `folded` (into the head) or `accepted`."""
        if self.verdict(route, model, form) != verdict:
            self._verdicts.decide(self._subject(route, model), _about(form), verdict)
            _LOG.warning("%s: a line as %s is %s by the upstream", route, form, verdict)

    def took(self, route: str, model: str, form: Form) -> None:
        """A line in this form was not refused."""
        if not self.verdict(route, model, form):
            self.decide(route, model, form, _TAKEN)

    def refused_announcement(self, route: str, model: str) -> None:
        """A first request was refused, and taken as it came. After a few of them none is rewritten for a day."""
        place = (route, model)
        self._strikes[place] = self._strikes.get(place, 0) + 1
        if self._strikes[place] >= _STRIKES:
            self._verdicts.decide(self._subject(*place), _OFF, "the announcement is refused", for_s=_OFF_S)

    def switch_off(self, route: str, model: str) -> None:
        """Rewrite nothing for a day: it did not pay."""
        self._verdicts.decide(self._subject(route, model), _OFF, "rewriting lost tokens", for_s=_OFF_S)
        _LOG.warning("%s: rewriting is switched off for a day, because it lost tokens", route)

    def _subject(self, route: str, model: str) -> str:
        return f"{self._upstream} {route} {json.dumps(model, ensure_ascii=not model.isprintable())[1:-1]}"


def _about(form: Form) -> str:
    """Under what name it is remembered whether the upstream takes a form."""
    return f"line as {form}"
