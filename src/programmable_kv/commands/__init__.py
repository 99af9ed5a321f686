"""The commands of `pkv`, one module for each purpose."""
