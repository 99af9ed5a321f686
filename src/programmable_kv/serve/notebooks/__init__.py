"""Notebooks in front of an upstream: their text is sent as it was first, and later values are told in lines behind it."""
