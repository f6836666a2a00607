"""Experiments' logs as one HTML page."""
