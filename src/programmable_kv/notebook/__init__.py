"""`Notebook`: a context of text and fields, and the operations on its KV cache."""
