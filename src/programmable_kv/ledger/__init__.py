"""What every cached token has read, and its state since. No tensors, no tokenizer, no model."""
