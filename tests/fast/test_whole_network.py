"""Whole networks compiled, captured, in half precision: the same results, nothing made anew each time."""

import pytest
import torch
from torch import nn

from esc_basicsr import fast
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import whole_network
from esc_basicsr.fast.whole_network import ByGraphs


class Capture:
    """Stands in for CUDA graphs: replays write into one output, as graphs do."""

    def __init__(self):
        self.shapes = []

    def __call__(self, run, x):
        self.shapes.append(tuple(x.shape))
        given = x.clone()

        def replay(x):
            given.copy_(x)
            return run(given).clone()

        return replay


@pytest.fixture
def net(lively_network):
    return lively_network()


@pytest.mark.slow
def test_one_compilation_serves_many_sizes(lively_network, monkeypatch):
    graphs = []

    def compile_and_count(self, **options):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_and_count)
    net = lively_network(conv_blocks=1)
    compiled = fast.prepare(net, mode="compiled")
    with torch.no_grad():
        for height, width in [(9, 13), (17, 5), (31, 33), (7, 6)]:
            lq = torch.rand(1, 3, height, width)
            assert torch.allclose(compiled(lq), net(lq), atol=1e-5)
    assert len(graphs) == 1


def test_graphs_are_captured_once_a_size_and_give_what_the_network_gives(net):
    capture = Capture()
    graphs = ByGraphs(net, capture)
    with torch.inference_mode():
        outputs = []
        for height, width in [(8, 8), (9, 13), (8, 8), (9, 13), (8, 8)]:
            lq = torch.rand(2, 3, height, width)
            outputs.append((graphs(lq), net(lq)))
    assert capture.shapes == [(2, 3, 8, 8), (2, 3, 9, 13)]
    assert all(torch.equal(made, expected) for made, expected in outputs)


def test_graphs_that_were_not_used_lately_are_dropped(net, monkeypatch):
    monkeypatch.setattr(whole_network, "_MOST_GRAPHS", 2)
    capture = Capture()
    graphs = ByGraphs(net, capture)
    with torch.no_grad():
        for side in (4, 5, 4, 6, 4, 5):
            graphs(torch.rand(1, 3, side, side))
    assert [shape[-1] for shape in capture.shapes] == [4, 5, 6, 5]
    assert len(graphs._replays) == 2


def test_a_type_and_autocast_have_graphs_of_their_own(net):
    capture = Capture()
    graphs = ByGraphs(net, capture)
    lq = torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        exact = graphs(lq)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                assert 0 < (graphs(lq) - exact).abs().max() < 0.05
        assert torch.equal(graphs(lq), exact)
    assert len(capture.shapes) == 3


def test_graphs_read_weights_that_change_and_leave_gradients_to_the_network(net):
    graphs, lq = ByGraphs(net, Capture()), torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        before = graphs(lq)
        net.proj.weight.mul_(2)
        assert not torch.equal(graphs(lq), before) and torch.equal(graphs(lq), net(lq))
    net.requires_grad_(True)
    graphs(lq).sum().backward()
    assert net.proj.weight.grad is not None


def test_elsewhere_than_on_cuda_graphs_are_the_network(net):
    graphs, lq = fast.prepare(net, mode="graphs"), torch.rand(1, 3, 5, 4)
    with torch.no_grad():
        assert torch.equal(graphs(lq), fast.prepare(net)(lq))
    assert not graphs._replays


@pytest.mark.parametrize(("mode", "dtype"), [("eager+bf16", torch.bfloat16), ("graphs+fp16", torch.float16)])
def test_half_precision_comes_close_and_gives_float32(net, mode, dtype):
    lq = torch.rand(1, 3, 9, 12)
    half = fast.prepare(net, mode=mode)
    with torch.no_grad():
        sr, expected = half(lq), net(lq)
    assert sr.dtype == torch.float32
    assert 0 < (sr - expected).norm() / expected.norm() < 40 * torch.finfo(dtype).eps


def test_scores_that_overflow_half_precision_are_no_harm(net):
    attention = net.blocks[0].attn
    attention.to_qkv.weight.data.mul_(100)
    with torch.no_grad():
        assert fast.prepare(net, mode="eager+fp16")(torch.rand(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("mode", ["", "fast", "graphs+", "graphs+fp8", "+fp16"])
def test_modes_that_do_not_exist_are_refused(net, mode):
    with pytest.raises(
        UserError, match=r"mode must be one of eager, compiled, graphs, with \+fp16 or \+bf16"
    ):
        fast.prepare(net, mode=mode)
