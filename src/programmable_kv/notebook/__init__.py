"""What a user holds: a context of text and fields, and the operations on its cache."""
