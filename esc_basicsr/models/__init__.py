"""Models that BasicSR lacks."""
