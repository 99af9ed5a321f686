"""Training of the adapters that the package ships. Not part of the wheel."""
