"""From a manifest to an output folder, atomically: shards, index, companion files, card, provenance."""
