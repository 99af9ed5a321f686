"""Loading a model, fetching the embedded one, and identifying models by fingerprints."""
