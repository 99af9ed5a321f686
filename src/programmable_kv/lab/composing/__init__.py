"""Do compiled pieces, spliced together, act as the same text prefilled? On real weights, against controls."""
