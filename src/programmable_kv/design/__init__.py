"""Visibility by design: rules for which part of a context reads which, so that edits are exact at a known cost."""
