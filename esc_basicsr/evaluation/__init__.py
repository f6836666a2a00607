"""Validation and testing: shared by all ranks, with results as tables beside the published ones."""
