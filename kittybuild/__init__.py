"""kittybuild: reproducible builds of merged checkpoints."""

__version__ = "0.1.0"
