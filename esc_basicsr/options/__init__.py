"""Option files: read, checked, generated."""
