"""Interventions in forwards and caches, and what is read from them. Every intervention is a context that takes itself back."""
