"""What the keys and values of a prefilled context hold, experiment by experiment: `pkv lab run NAME`."""
