"""Your own prompt: declare fields in a text, compute it once, and edit the cache when a value changes.

Run it: python examples/own_prompt.py
"""

from programmable_kv import Model, Notebook, load_model

PROMPT = """You are the support agent of an online shop.

# Session
order_status: {order_status}
tier: {tier}

# Policy
- Be polite and brief in every message.
- If order_status is pending, cancel.
- If order_status is shipped, deny.

Reply with the action only."""
OPTIONS = ["cancel", "deny"]


def main(model: Model) -> list[str]:
    """Decide before and after an edit, then try another value and roll it back; returns the three decisions."""
    notebook = Notebook(model)
    notebook.message("system", PROMPT, order_status="pending", tier="gold")
    notebook.message("user", "Somebody asks for a cancellation. What do you do?")
    whole = notebook.prefill()
    before = notebook.decide(options=OPTIONS)
    print(f"pending: {before.choice}, after computing {whole.tokens_computed} tokens")

    edited = notebook.edit(order_status="shipped")
    after = notebook.decide(options=OPTIONS)
    print(f"shipped: {after.choice}, after computing {edited.tokens_computed} tokens")

    mark = notebook.mark()
    notebook.edit(order_status="pending", mode="suffix")  # exact: everything after the field is recomputed
    tried = notebook.decide(options=OPTIONS)
    notebook.rollback(mark)
    print(f"tried pending: {tried.choice}; the context says {notebook.fields['order_status']} again")
    return [before.choice, after.choice, tried.choice]


if __name__ == "__main__":
    main(load_model())
