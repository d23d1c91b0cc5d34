"""From a recipe and headers to a plan, and from a plan and the store to what is to be done. Starts no torch."""
