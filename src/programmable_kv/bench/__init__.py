"""Benches: each measures an operation and what a user would do instead within one run, and writes a record."""
