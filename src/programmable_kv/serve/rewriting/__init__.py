"""Modes that rewrite: what was sent once is sent again as it was, and what changed is told in a line behind it."""
