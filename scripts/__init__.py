"""Scripts that maintain the repository. They are not part of the wheel."""
