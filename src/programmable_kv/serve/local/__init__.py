"""Serves one model from this process in four protocols, and notebooks whose fields are edited in the cache."""
