"""Option files: reading, checking and writing them."""
