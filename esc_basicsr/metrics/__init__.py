"""Quality, results tables, published figures."""
