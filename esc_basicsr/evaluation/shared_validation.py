"""Validation in which every rank takes its share of the images."""

from basicsr.models.sr_model import SRModel

__all__ = ["SharedValidation"]


class SharedValidation(SRModel):
    """SRModel whose validation is shared by all ranks."""
