"""What every cached token has read, and what it is worth since. No tensors, no tokenizer, no model."""
