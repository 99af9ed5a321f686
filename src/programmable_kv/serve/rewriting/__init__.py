"""Modes that rewrite requests: earlier text is sent again unchanged, and a line behind it states what changed."""
