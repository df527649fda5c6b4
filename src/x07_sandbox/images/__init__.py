"""Guest images: building, manifest, cache, verification."""
