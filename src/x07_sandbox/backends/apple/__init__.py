"""The `apple-container` backend: virtual machines of Apple's `container`, on macOS 26 or newer."""
