"""The networks. They need torch and nothing else."""

from esc_basicsr.archs.bicubic_arch import Bicubic
from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCReal, ESCRealM
from esc_basicsr.archs.variants import VARIANTS

__all__ = ["ESC", "ESCFP", "VARIANTS", "Bicubic", "ESCReal", "ESCRealM"]
