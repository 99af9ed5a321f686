"""Models trained from scratch, in minutes, on policies of a few tokens, to see when notes appear."""
