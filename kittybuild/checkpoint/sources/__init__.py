"""Where checkpoints come from that are not here: the Hub, its cache on this machine, and parts of files."""
