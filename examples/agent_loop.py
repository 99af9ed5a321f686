"""An agent on one live cache: the state changes, tools report, skills come and go; each turn computes only what is new.

Run it: python examples/agent_loop.py
"""

from programmable_kv import Agent, Model, Skill, load_model

POLICY = """You are the support agent of an online shop.

# Session
order_status: {order_status}

# Policy
- If order_status is pending, cancel.
- If order_status is shipped, deny.

Reply with the action only."""
RETURNS = "\nFor returns: If tier is gold, accept_return. If tier is basic, open_ticket.\ntier: gold\n"
ASKED = "Somebody asks for a cancellation. What do you do?"


def main(model: Model) -> list[str]:
    """Play the events of one conversation; returns the decision of each turn."""
    agent = Agent(model, POLICY, order_status="pending")
    actions = ["cancel", "deny"]
    agent.act(ASKED, actions)
    agent.observe("user", "The warehouse wrote: the parcel left at 14:02.")
    agent.act(ASKED, actions, order_status="shipped")  # the change and the request in one forward

    agent.add_skill(Skill.compile(model, RETURNS, name="returns"))
    agent.act("Request: a return. Which action?", ["accept_return", "open_ticket"])
    agent.remove_skill("returns")
    agent.act(ASKED, actions)

    for turn in agent.turns:
        changes = ", ".join(f"{name}={value}" for name, value in turn.changes.items()) or "no change"
        print(f"{turn.decision.choice:14} {changes:22} {turn.account.tokens_computed:4} tokens computed")
    print(f"in all {agent.account.tokens_computed} tokens computed, in a context of {len(agent.notebook)}")
    return [turn.decision.choice for turn in agent.turns]


if __name__ == "__main__":
    main(load_model())
