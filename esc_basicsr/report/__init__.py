"""Training looked at: what experiments logged, as one HTML page."""
