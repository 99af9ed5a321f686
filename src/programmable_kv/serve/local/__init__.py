"""A model served by this process: Chat Completions, and notebooks whose fields are edited in the cache."""
