"""Weight files, and the network they belong to."""
