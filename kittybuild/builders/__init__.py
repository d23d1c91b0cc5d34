"""The maths: versioned pure functions over tensors, and the registry of them. Reads no file, no clock, no environment.

Importing the registry does not import torch: each builder asks for it when it runs.
"""
