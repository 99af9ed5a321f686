"""Texts compiled once and spliced wherever they are needed."""
