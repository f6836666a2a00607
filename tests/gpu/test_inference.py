"""On a GPU whole networks run compiled, from graphs, in half precision, in little memory as plainly."""

import cv2
import numpy as np
import pytest
import torch

from esc_basicsr import fast
from esc_basicsr.__main__ import main
from esc_basicsr.archs.variants import NETWORKS
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.export.onnx_network import write_onnx
from esc_basicsr.fast import gpu, whole_network
from esc_basicsr.upscale.upscaler import Upscaler

# (batch, height, width): a pixel, below a window, whole windows, odd
SIZES = [(1, 1, 1), (1, 3, 2), (2, 8, 12), (3, 21, 13), (1, 40, 33)]


@pytest.fixture(params=NETWORKS)
def net(request, lively_network):
    return lively_network(type=request.param, upscaling_factor=4 if request.param == "ESCReal" else 2).cuda()


def assert_close(made, expected, tolerance=2e-5):
    assert made.shape == expected.shape and made.dtype == expected.dtype
    assert (made - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("options", [{}, {"kernels": True}, {"kernels": True, "mode": "graphs"}], ids=str)
def test_any_size_and_batch(net, options):
    prepared = fast.prepare(net, **options)
    for batch, height, width in SIZES:
        lq = torch.rand(batch, 3, height, width, device="cuda")
        with torch.no_grad():
            sr, expected = prepared(lq), net(lq)
            assert_close(prepared(lq.to(memory_format=torch.channels_last)), expected)
            assert_close(torch.cat([prepared(image[None]) for image in lq]), expected)
        assert_close(sr, expected)
    assert not gpu.take_failures()


@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-2), ("bf16", 1e-1)])
def test_half_precision_comes_close_and_gives_float32(net, mode, precision, tolerance):
    half = fast.prepare(net, kernels=True, mode=f"{mode}+{precision}")
    for batch, height, width in SIZES:
        lq = torch.rand(batch, 3, height, width, device="cuda")
        with torch.no_grad():
            assert_close(half(lq), net(lq), tolerance)
    assert not gpu.take_failures()


def test_graphs_survive_other_sizes_other_modes_and_changed_weights(lively_network, monkeypatch):
    monkeypatch.setattr(whole_network, "_MOST_GRAPHS", 2)
    net = lively_network().cuda()
    graphs = fast.prepare(net, kernels=True, mode="graphs")
    images = [torch.rand(1, 3, side, side + 1, device="cuda") for side in (8, 13, 8, 21, 13, 8)]
    with torch.inference_mode():
        kept = [(graphs(lq), net(lq)) for lq in images]
    for made, expected in kept:  # no replay has overwritten another's result
        assert_close(made, expected)
    assert len(graphs._replays) == 2
    with torch.no_grad():
        assert_close(graphs(images[-1]), net(images[-1]))  # captured in inference mode
        net.proj.weight.mul_(2)
        assert_close(graphs(images[-1]), net(images[-1]))
        with torch.autocast("cuda", torch.float16):
            half = graphs(images[-1])
        assert_close(half.float(), net(images[-1]), 2e-2)


def test_a_compiled_network_is_not_compiled_again_for_other_sizes(lively_network):
    net = lively_network().cuda()
    compiled = fast.prepare(net, mode="compiled")
    with torch.no_grad():
        for number, (height, width) in enumerate([(9, 13), (17, 5), (31, 33), (41, 22)]):
            lq = torch.rand(1, 3, height, width, device="cuda")
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                assert_close(compiled(lq), net(lq))


@pytest.fixture
def little_memory():
    """Let PyTorch take 256 MiB of the GPU's memory beyond what it has."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_it_goes_on_in_pieces_where_memory_runs_out(model, little_memory, esc_log):
    image = np.tile(load_sample_image("coffee")[:256, :256], (6, 6, 1))
    in_pieces = Upscaler(model, device="cuda", precision="fp32")(image)
    assert any("are too many for the memory: they are worked through in tiles" in text for text in esc_log)
    expected = Upscaler(model, device="cpu")(image)
    difference = np.abs(in_pieces.astype(int) - expected)
    assert difference.mean() < 0.5 and in_pieces.shape == (3072, 3072, 3)


def test_upscale_in_half_precision_gives_what_a_cpu_gives(model, tmp_path):
    cv2.imwrite(str(tmp_path / "in.png"), load_sample_image("chelsea")[:150, :130])
    call = ["upscale", str(tmp_path / "in.png"), "--model", str(model)]
    images = []
    for device, precision in (("cpu", "fp32"), ("cuda", "fp16")):
        target = tmp_path / f"{precision}.png"
        assert main([*call, "-o", str(target), "--device", device, "--precision", precision]) == 0
        images.append(cv2.imread(str(target)).astype(int))
    difference = np.abs(images[1] - images[0])
    assert difference.max() <= 3 and difference.mean() < 0.2


def test_onnx_by_the_cuda_provider(lively_network):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    net = lively_network()
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(write_onnx(net, False, {}, 18), providers=providers)
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    (given,) = session.get_inputs()
    for batch, height, width in SIZES:
        lq = torch.rand(batch, 3, height, width)
        (sr,) = session.run(None, {given.name: lq.numpy()})
        assert_close(torch.from_numpy(sr), net(lq), 1e-4)
