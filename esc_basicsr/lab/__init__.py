"""Comparing networks, and looking into them."""
