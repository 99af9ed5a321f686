"""The prompt as its author wrote it: rendered by the chat template and tokenised. No tensors here."""
