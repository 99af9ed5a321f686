"""The ledger: what every cached token has read, and its state now. It uses no tensors, no tokenizer and no model."""
