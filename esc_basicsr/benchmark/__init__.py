"""Measurements behind the figures in docs/; each module is run with ``python -m``."""
