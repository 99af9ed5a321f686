"""A model served by this process in four protocols, and notebooks whose fields are edited in the cache."""
