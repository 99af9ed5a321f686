"""Experiments on what the keys and values of a prefilled context hold: `pkv lab run NAME`."""
