"""How the networks of `archs` run fast: the same results, proved equal by the golden tests.

from esc_basicsr import fast

with torch.no_grad():  # with gradients it is the plain network
    sr = fast.prepare(net)(lq)                # inference: row chunks, frequency tiles, SDPA
    sr = fast.prepare(net, kernels=True)(lq)  # and kernels: C++ in float32 on a CPU, Triton on CUDA
    sr = fast.prepare(net, kernels=True, mode="graphs+fp16")(lq)  # and a CUDA graph, half precision
fast.attend_by_kernels(net)               # training: window attention alone, by these kernels
"""

from torch import nn

from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.fast.attention import attend_by_kernels
from esc_basicsr.fast.network import FastNetwork
from esc_basicsr.fast.real_network import FastRealNetwork
from esc_basicsr.fast.whole_network import run_whole

__all__ = ["FastNetwork", "attend_by_kernels", "prepare"]


def prepare(net: nn.Module, kernels: bool = False, mode: str = "eager") -> nn.Module:
    """Give a network its fast implementation; of any network but ESC's own, itself, in the mode.

    Args:
        net: The network; its weights are shared, not copied.
        kernels: Whether kernels serve where they can: C++ in float32 on a CPU, Triton's on CUDA.
        mode: How the network runs as a whole, see `run_whole`: ``eager``, ``compiled`` or ``graphs``, each
            with ``+fp16`` or ``+bf16`` or without.

    Raises:
        UserError: The kernels are wanted and cannot be compiled; or there is no such mode.
    """
    if isinstance(net, ESCRealM):
        net = FastRealNetwork(net, kernels)
    elif isinstance(net, ESC | ESCFP):
        net = FastNetwork(net, kernels)
    return run_whole(net, mode)
