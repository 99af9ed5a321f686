"""The KV cache: its layout, the rotation of its keys, attention masks, and the buffer that stores and edits it."""
