"""Proofs on the loaded weights: whether tokens can be relocated and recomputed exactly, or the reason why not."""
