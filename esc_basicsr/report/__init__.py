"""What experiments logged, as one HTML page."""
