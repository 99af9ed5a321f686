"""The commands of `pkv`, by what they are for."""
