"""Checkpoints as bytes: headers, ranges and companion files of sources. Computes nothing, writes nothing."""
