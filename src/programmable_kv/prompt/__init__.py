"""What the author wrote, rendered and tokenised. No tensors here."""
