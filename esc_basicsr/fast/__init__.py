"""How the networks of `archs` run fast: the same results, proved equal by the golden tests.

from esc_basicsr import fast

with torch.no_grad():  # with gradients it is the plain network
    sr = fast.prepare(net)(lq)                # inference: row chunks, frequency tiles, SDPA
    sr = fast.prepare(net, kernels=True)(lq)  # and kernels: C++ on a CPU, Triton on CUDA
    with torch.autocast("cpu", torch.bfloat16):  # faster where `fast.require_bf16` finds instructions
        sr = fast.prepare(net, kernels=True)(lq)
fast.attend_by_kernels(net)               # training: window attention alone, by these kernels
"""

from torch import nn

from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.fast.attention import attend_by_kernels
from esc_basicsr.fast.kernels import require_bf16
from esc_basicsr.fast.network import FastNetwork
from esc_basicsr.fast.real_network import FastRealNetwork

__all__ = ["FastNetwork", "attend_by_kernels", "prepare", "require_bf16"]


def prepare(net: nn.Module, kernels: bool = False) -> nn.Module:
    """Give a network its fast implementation; any network but ESC's own is returned as it is.

    Args:
        net: The network; its weights are shared, not copied.
        kernels: Whether kernels serve where they can: C++ on a CPU, in float32 or within autocast to
            bfloat16; Triton's on CUDA.

    Raises:
        UserError: The kernels are wanted and cannot be compiled.
    """
    if isinstance(net, ESCRealM):
        return FastRealNetwork(net, kernels)
    return FastNetwork(net, kernels) if isinstance(net, ESC | ESCFP) else net
