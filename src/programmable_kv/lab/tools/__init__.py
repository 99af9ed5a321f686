"""Interventions in forwards and caches, and measurements. Every intervention is a context manager that undoes it."""
