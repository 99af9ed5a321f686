"""Loops over a live notebook."""
