"""The grammar of gated decisions: data for training, lab and benches."""
