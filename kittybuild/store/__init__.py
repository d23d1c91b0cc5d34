"""The local store: packs, realisations, locations, manifests and roots. Bytes and facts only; computes nothing."""
