"""Held-out scenarios: policies from domains, field names, actions and wordings that training never sees.

The lab and the benches draw their data here. A scenario depends only on its seed and its number, so a longer draw
begins with the scenarios of a shorter one.
"""

from __future__ import annotations

import random

from programmable_kv.scenarios.grammar import Scenario, make_scenario
from programmable_kv.scenarios.vocabulary import held_out_domains


def held_out_scenarios(count: int, seed: int) -> list[Scenario]:
    """Draw `count` scenarios, from each held-out domain in turn."""
    domains = held_out_domains()
    return [
        make_scenario(random.Random(f"{seed}/{i}"), "held_out", domain=domains[i % len(domains)]) for i in range(count)
    ]


def held_out_scenarios_per_domain(instances: int, seed: int) -> list[Scenario]:
    """Draw `instances` scenarios of every held-out domain, domain by domain."""
    return [
        make_scenario(random.Random(f"{seed}/{domain.name}/{number}"), "held_out", domain=domain)
        for domain in held_out_domains()
        for number in range(instances)
    ]
