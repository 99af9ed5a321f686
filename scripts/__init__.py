"""What maintains the repository. Not part of the wheel."""
