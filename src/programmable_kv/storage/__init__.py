"""Storage of notebooks and skills on disk or at any fsspec URL."""
