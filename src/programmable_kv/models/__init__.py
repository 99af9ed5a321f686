"""Loading a model, fetching the embedded one, and telling models apart."""
