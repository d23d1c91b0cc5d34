"""Realising derivations: the only part that runs the maths. Blocks, workers, one memory budget."""
