"""The grammar of gated decisions: it makes the data for training, lab and benches."""
