"""Skills: texts that are compiled once and spliced wherever they are needed."""
