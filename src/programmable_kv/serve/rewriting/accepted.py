"""Finds out by trying what an upstream accepts from a gateway that rewrites, and stores it for each route and model."""

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
"""Requests in a row that the upstream takes only unchanged, after which no more are tried. A single one may have been
too long for the model's context."""
_DAY_S = 86400.0
"""Seconds for which a verdict is relied on."""
_TAKEN = "taken"
"""Not refused. Whether the line is folded into the head is not known yet."""


class Accepted:
    """Verdicts about an upstream. What only a tenant's own requests showed holds for that tenant alone. Thread-safe."""

    def __init__(self, verdicts: Verdicts, upstream: str) -> None:
        """
        Args:
            upstream: the upstream's address. Verdicts are stored under it.
        """
        self._verdicts = verdicts
        self._upstream = upstream
        self._strikes: dict[tuple[str, str, str, str], int] = {}
        """Number of refusals, by tenant, route, model and what was refused."""
        self._announced: set[tuple[str, str]] = set()
        """Routes and models where an announcement was accepted. If one is refused there, it has other reasons."""

    def found_out(self, tenant: str, route: str, model: str) -> dict[str, str]:
        """The verdicts that hold for a tenant, by what they are about."""
        subject = self._subject(route, model)
        return self._verdicts.of(subject, f"{tenant}\n{subject}")

    @staticmethod
    def is_off(found: Mapping[str, str]) -> bool:
        """Whether these verdicts switch rewriting off."""
        return _OFF in found

    def is_proven(self, tenant: str, route: str, model: str, what: str) -> bool:
        """Whether the upstream accepted a line in a form before. `what` names the form as `forms.about` does."""
        return self.found_out(tenant, route, model).get(what, "") in (_TAKEN, "accepted")

    def verdict(self, route: str, model: str, form: Form) -> str:
        """The verdict about a form for all tenants; empty if there is none."""
        return self._verdicts.of(self._subject(route, model)).get(about(form), "")

    def decide(self, route: str, model: str, form: Form, verdict: str) -> None:
        """Store the verdict about a form: `refused`, `folded` (into the head) or `accepted`."""
        if self.verdict(route, model, form) != verdict:
            self._decide(route, model, about(form), verdict)

    def rendered(self, route: str, model: str, found: Mapping[str, str]) -> None:
        """Store what renderings showed: verdicts, by what they are about."""
        for what, verdict in found.items():
            self._verdicts.decide(self._subject(route, model), what, verdict, for_s=_DAY_S)

    def took(self, tenant: str, route: str, model: str, what: str) -> None:
        """Record that a line in a form was not refused."""
        if not self.found_out(tenant, route, model).get(what, ""):
            self._decide(route, model, what, _TAKEN)

    def refused(self, tenant: str, route: str, model: str, what: str, *, as_it_came: bool) -> None:
        """Record that a line in a form was refused, before the request was accepted in another form or only unchanged.

        If it was accepted only unchanged (`as_it_came`), there may be other reasons. Then the verdict needs a few
        refusals, and holds for this tenant alone."""
        if not as_it_came:
            self._decide(route, model, what, "refused", for_s=_DAY_S)
        elif self._strikes_out((tenant, route, model, what)):
            self._decide(route, model, what, "refused", for_s=_DAY_S, tenant=tenant)

    def took_announcement(self, route: str, model: str) -> None:
        """Record that a conversation began with an announcement."""
        self._announced.add((route, model))

    def refused_announcement(self, tenant: str, route: str, model: str) -> None:
        """Record that a first request was accepted only unchanged. A few of them switch the tenant's rewriting off."""
        if (route, model) not in self._announced and self._strikes_out((tenant, route, model, _OFF)):
            self._decide(route, model, _OFF, "the announcement is refused", for_s=_DAY_S, tenant=tenant)

    def switch_off(self, tenant: str, route: str, model: str) -> None:
        """Rewrite none of a tenant's requests for a day, because it did not pay."""
        self._decide(route, model, _OFF, "rewriting lost tokens", for_s=_DAY_S, tenant=tenant)

    def as_json(self, tenant: str, used: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        """The verdicts about some routes and models that hold for a tenant."""
        return [
            {"of": f"{route} {_printable(model)}", "about": what, "verdict": verdict}
            for route, model in used
            for what, verdict in sorted(self.found_out(tenant, route, model).items())
        ]

    def _decide(
        self, route: str, model: str, what: str, verdict: str, *, for_s: float | None = None, tenant: str = ""
    ) -> None:
        """Store a verdict; with `tenant`, for that tenant alone."""
        subject = self._subject(route, model)
        self._verdicts.decide(f"{tenant}\n{subject}" if tenant else subject, what, verdict, for_s=for_s)
        _LOG.warning("%s: %s: %s", route, what, verdict)

    def _strikes_out(self, key: tuple[str, str, str, str]) -> bool:
        """Count a refusal that a tenant's own requests may have caused. Returns whether there were enough."""
        self._strikes[key] = self._strikes.get(key, 0) + 1
        if self._strikes[key] < _STRIKES:
            return False
        del self._strikes[key]
        return True

    def _subject(self, route: str, model: str) -> str:
        return f"{self._upstream} {route} {_printable(model)}"


def _printable(model: str) -> str:
    """A model's name in printable characters: a client may have made it up."""
    return json.dumps(model, ensure_ascii=not model.isprintable())[1:-1]
