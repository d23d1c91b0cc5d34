"""Pure values: what a recipe says, what a plan decides, what a build made. No IO, no torch."""
