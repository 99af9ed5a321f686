"""Explains prefix-cache misses from a log: compares requests as a cache does. Needs no model, gateway or network."""
