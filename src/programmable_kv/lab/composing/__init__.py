"""Compares compiled pieces, spliced together, with a prefill of the same text. On real weights, against controls."""
