"""Networks of any origin, by name."""
