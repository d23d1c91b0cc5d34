"""The text of recipes: YAML with positions, the schema at the edge, mergekit dialects, settings."""
