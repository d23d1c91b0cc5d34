"""Remote caches: blobs by digest, which need no trust, and signed claims of what derivations make, which do."""
