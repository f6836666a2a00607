"""Upscaling images with a trained network: from Python by `Upscaler`, as a command on files."""

from esc_basicsr.upscale.upscaler import Upscaler

__all__ = ["Upscaler"]
