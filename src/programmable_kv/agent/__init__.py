"""Agents: loops over a live notebook."""
