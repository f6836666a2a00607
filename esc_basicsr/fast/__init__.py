"""Running the networks of `archs` fast: the same results, proved equal by the golden tests.

from esc_basicsr import fast

with torch.no_grad():  # with gradients it is the plain network
    sr = fast.prepare(net)(lq)                # inference: row chunks, frequency tiles, SDPA
    sr = fast.prepare(net, kernels=True)(lq)  # and kernels: C++ on a CPU, Triton on CUDA
    sr = fast.prepare(net, kernels=True, mode="eager+bf16")(lq)  # where `fast.require_bf16` lets a CPU
    sr = fast.prepare(net, kernels=True, mode="graphs+fp16")(lq)  # and a CUDA graph, half precision
fast.train_by_kernels(net)                # training: by these kernels, in float32 or autocast to bfloat16
"""

from torch import nn

from esc_basicsr.archs.esc_arch import ESC
from esc_basicsr.archs.esc_fp_arch import ESCFP
from esc_basicsr.archs.esc_real_arch import ESCRealM
from esc_basicsr.fast.attention import attend_by_kernels
from esc_basicsr.fast.kernels import require_bf16
from esc_basicsr.fast.network import FastNetwork
from esc_basicsr.fast.real_network import FastRealNetwork
from esc_basicsr.fast.training import train_by_kernels
from esc_basicsr.fast.whole_network import run_whole

__all__ = ["FastNetwork", "attend_by_kernels", "prepare", "require_bf16", "train_by_kernels"]


def prepare(net: nn.Module, kernels: bool = False, mode: str = "eager") -> nn.Module:
    """Give a network its fast implementation; of any network but ESC's own, itself, in the mode.

    Args:
        net: The network; its weights are shared, not copied.
        kernels: Whether kernels serve where they can: C++ on a CPU, in float32 or within autocast to
            bfloat16; Triton's on CUDA.
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
