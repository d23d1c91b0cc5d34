"""Mixtures of experts: what routers are made of. Experts themselves are taken over as they are."""
