"""How the networks of `archs` run fast: the same results, proved equal by the golden tests.

from esc_basicsr import fast

with torch.no_grad():  # with gradients it is the plain network
    sr = fast.prepare(net)(lq)                # inference: row chunks, frequency tiles, SDPA
    sr = fast.prepare(net, kernels=True)(lq)  # and C++ kernels, float32 on a CPU, compiled once
fast.attend_by_kernels(net)               # training: window attention alone, by its C++ kernel
"""

from esc_basicsr.fast.attention import attend_by_kernels
from esc_basicsr.fast.network import FastNetwork, prepare

__all__ = ["FastNetwork", "attend_by_kernels", "prepare"]
