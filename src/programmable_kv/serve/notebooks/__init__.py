"""Notebooks in front of an upstream: their text is sent unchanged, and lines at the end state newer values."""
