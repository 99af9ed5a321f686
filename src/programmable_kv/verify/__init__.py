"""Proofs on the loaded weights: what can be moved and recomputed exactly, or the reason why not."""
