"""Notebooks in front of an upstream: the text is always sent unchanged, and lines at the end state newer values."""
