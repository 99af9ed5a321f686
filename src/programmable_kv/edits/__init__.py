"""Plans of every operation on a cached context, and the one place that carries them out."""
