"""Benchmarks: each compares whole processes side by side in the same run. Ratios count; absolute times do not."""
