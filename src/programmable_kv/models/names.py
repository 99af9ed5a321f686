"""The names of the embedded models."""

EMBEDDED = "embedded"
EMBEDDED_PLAIN = "embedded-plain"
"""The embedded model as it was before its training for `visibility="design"`. The lab's records are about it."""
