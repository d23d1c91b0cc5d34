"""Merge methods in the arithmetic of mergekit and mergekitty: the same bits as those programs, on the CPU."""
