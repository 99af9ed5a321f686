"""What was published, and what our records say of it."""
