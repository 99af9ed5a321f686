"""The embedded model's adapter: a grammar of gated decisions, training on it, and held-out measurements."""
