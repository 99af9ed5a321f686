"""What an upstream takes from a gateway that rewrites, for each route and model: found out by trying, and remembered."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping

from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.forms import about
from programmable_kv.serve.rewriting.verdicts import Verdicts

_LOG = logging.getLogger("programmable_kv.serve")
_OFF = "off"
_STRIKES = 3
"""requests in a row that the upstream takes only as they came, after which no more are tried: one may have been too long for
the model's context"""
_DAY_S = 86400.0
"""how long what was found out is relied on"""
_TAKEN = "taken"
"""not refused; whether it is folded into the head is not known yet"""


class Accepted:
    """Verdicts about an upstream. What one tenant's own requests showed holds for that tenant alone. For several threads."""

    def __init__(self, verdicts: Verdicts, upstream: str) -> None:
        """
        Args:
            upstream: its address, under which is remembered what it takes.
        """
        self._verdicts = verdicts
        self._upstream = upstream
        self._strikes: dict[tuple[str, str, str, str], int] = {}
        """tenant, route, model and what was refused -> how often"""
        self._announced: set[tuple[str, str]] = set()
        """routes and models where an announcement was taken: a refused one has other reasons"""

    def found_out(self, tenant: str, route: str, model: str) -> dict[str, str]:
        """What holds for a tenant: verdicts, by what they are about."""
        subject = self._subject(route, model)
        return self._verdicts.of(subject, f"{tenant}\n{subject}")

    @staticmethod
    def is_off(found: Mapping[str, str]) -> bool:
        """Whether rewriting is switched off by what was found out."""
        return _OFF in found

    def is_proven(self, tenant: str, route: str, model: str, what: str) -> bool:
        """Whether the upstream took a line in a form before; `what`: the form, as `forms.about` says it."""
        return self.found_out(tenant, route, model).get(what, "") in (_TAKEN, "accepted")

    def verdict(self, route: str, model: str, form: Form) -> str:
        """What was found out about a form for all tenants; empty where nothing was."""
        return self._verdicts.of(self._subject(route, model)).get(about(form), "")

    def decide(self, route: str, model: str, form: Form, verdict: str) -> None:
        """Remember what was found out about a form: `refused`, `folded` (into the head) or `accepted`."""
        if self.verdict(route, model, form) != verdict:
            self._decide(route, model, about(form), verdict)

    def rendered(self, route: str, model: str, found: Mapping[str, str]) -> None:
        """Remember what renderings showed: about what, and the verdict."""
        for what, verdict in found.items():
            self._verdicts.decide(self._subject(route, model), what, verdict, for_s=_DAY_S)

    def took(self, tenant: str, route: str, model: str, what: str) -> None:
        """A line in a form was not refused."""
        if not self.found_out(tenant, route, model).get(what, ""):
            self._decide(route, model, what, _TAKEN)

    def refused(self, tenant: str, route: str, model: str, what: str, *, as_it_came: bool) -> None:
        """A line in a form was refused, and the request was taken in another form; or only as it came, which may have other
        reasons: then it counts for this tenant, after a few of them."""
        if not as_it_came:
            self._decide(route, model, what, "refused", for_s=_DAY_S)
        elif self._strikes_out((tenant, route, model, what)):
            self._decide(route, model, what, "refused", for_s=_DAY_S, tenant=tenant)

    def took_announcement(self, route: str, model: str) -> None:
        """A conversation began with an announcement."""
        self._announced.add((route, model))

    def refused_announcement(self, tenant: str, route: str, model: str) -> None:
        """A first request was refused, and taken as it came. After a few of them the tenant's are not rewritten for a day."""
        if (route, model) not in self._announced and self._strikes_out((tenant, route, model, _OFF)):
            self._decide(route, model, _OFF, "the announcement is refused", for_s=_DAY_S, tenant=tenant)

    def switch_off(self, tenant: str, route: str, model: str) -> None:
        """Rewrite nothing of a tenant's for a day: it did not pay."""
        self._decide(route, model, _OFF, "rewriting lost tokens", for_s=_DAY_S, tenant=tenant)

    def as_json(self, tenant: str, used: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        """What was found out about some routes and models, as far as it holds for a tenant."""
        return [
            {"of": f"{route} {_printable(model)}", "about": what, "verdict": verdict}
            for route, model in used
            for what, verdict in sorted(self.found_out(tenant, route, model).items())
        ]

    def _decide(
        self, route: str, model: str, what: str, verdict: str, *, for_s: float | None = None, tenant: str = ""
    ) -> None:
        """Remember what was found out; with a tenant, for that one alone."""
        subject = self._subject(route, model)
        self._verdicts.decide(f"{tenant}\n{subject}" if tenant else subject, what, verdict, for_s=for_s)
        _LOG.warning("%s: %s: %s", route, what, verdict)

    def _strikes_out(self, key: tuple[str, str, str, str]) -> bool:
        """Count a refusal that a tenant's own requests may be the reason of. Whether there were enough."""
        self._strikes[key] = self._strikes.get(key, 0) + 1
        if self._strikes[key] < _STRIKES:
            return False
        del self._strikes[key]
        return True

    def _subject(self, route: str, model: str) -> str:
        return f"{self._upstream} {route} {_printable(model)}"


def _printable(model: str) -> str:
    """A model's name, which a client may have made up."""
    return json.dumps(model, ensure_ascii=not model.isprintable())[1:-1]
