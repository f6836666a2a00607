"""What any use of the networks may rely on, whatever the backend."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from esc_basicsr.archs import ESCFP, VARIANTS, ESCRealM, attention
from esc_basicsr.archs.attention import ATTN_TYPES, WindowAttention, expand_position_bias
from esc_basicsr.archs.conv_attention import average_over_symmetries
from esc_basicsr.archs.layers import pad_to_multiple
from esc_basicsr.archs.variants import NETWORKS


@pytest.fixture(params=NETWORKS)
def net(request, tiny_network, build_network):
    tiny_network["type"] = request.param
    if request.param == "ESCReal":
        tiny_network["upscaling_factor"] = 4  # it has no other
    net = build_network(tiny_network)
    # Published weights have predicted kernels and biases that matter; fresh ones are near zero.
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if isinstance(net, ESCRealM) else 0.2)  # more layers
    return net


def backend(net, attn_type):
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.attn_type = attn_type
    return net


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_batch_equals_its_images_one_by_one(net, attn_type):
    backend(net, attn_type).eval()
    lq = torch.rand(3, 3, 9, 14)
    with torch.no_grad():
        together = net(lq)
        apart = torch.cat([net(image[None]) for image in lq])
    assert torch.allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (2, 3), (3, 5), (4, 4), (5, 1), (17, 8)])
def test_any_size_gives_a_finite_image_of_the_scaled_size_alike_in_train_and_eval(net, height, width):
    lq = torch.rand(2, 3, height, width)
    with torch.no_grad():
        trained, evaluated = net.train()(lq), net.eval()(lq)
    scale = net.upscaling_factor
    assert trained.shape == (2, 3, scale * height, scale * width)
    assert trained.isfinite().all()
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("multiple", [4, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 20])
def test_padding_reflects_back_and_forth_as_numpy_does(size, multiple):
    x = torch.rand(1, 2, size, size + 1)
    extra = [-side % multiple for side in (size, size + 1)]
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, extra[0]), (0, extra[1])], mode="reflect")
    assert np.array_equal(pad_to_multiple(x, multiple).numpy(), expected)


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_input_is_not_written_to_and_gets_gradients_in_eval(net, attn_type):
    backend(net, attn_type).eval()
    lq = torch.rand(1, 3, 6, 6, requires_grad=True)
    before = lq.detach().clone()
    sr = net(lq)
    sr.square().sum().backward()
    with torch.no_grad():
        assert torch.allclose(net(lq), sr, atol=1e-5)
    assert torch.equal(lq.detach(), before)
    assert lq.grad is not None and lq.grad.abs().sum() > 0


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_deepcopy_uses_its_own_position_bias(net, attn_type):
    backend(net, attn_type).eval()
    lq = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        before = net(lq)
        ema = copy.deepcopy(net)
        for name, parameter in net.named_parameters():
            if name.endswith("relative_position_bias"):
                parameter.normal_(std=5)
        assert torch.equal(ema(lq), before)
        assert not torch.allclose(net(lq), before, atol=1e-3)


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_pickle_and_state_dict_round_trips_keep_the_output(net, attn_type, tiny_network):
    backend(net, attn_type).eval()
    lq = torch.rand(1, 3, 8, 8)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = type(net)(**{k: v for k, v in tiny_network.items() if k != "type"}).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        expected = net(lq)
        assert torch.equal(pickle.loads(pickle.dumps(net))(lq), expected)
        assert torch.allclose(fresh(lq), expected, atol=1e-5)


@pytest.mark.parametrize("attn_type", ["SDPA", "Flex"])
@pytest.mark.parametrize("window_size", [1, 2, 5, 8, 32])
def test_backends_agree_with_naive_attention_in_output_and_gradients(attn_type, window_size):
    layer = WindowAttention(8, window_size, 2, "Naive").double()
    torch.nn.init.normal_(layer.relative_position_bias)
    x = torch.rand(2, 8, 11, 7, dtype=torch.float64, requires_grad=True)

    def outcome(kind):
        layer.attn_type = kind
        out = layer(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        with torch.no_grad():
            return [layer(x), out, *gradients]

    for expected, got in zip(outcome("Naive"), outcome(attn_type), strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_naive_attention_follows_the_definition_pixel_by_pixel():
    w, heads, d = 3, 2, 4
    layer = WindowAttention(heads * d, w, heads, "Naive").double()
    torch.nn.init.normal_(layer.relative_position_bias)
    x = torch.rand(1, heads * d, w, w, dtype=torch.float64)
    qkv = layer.to_qkv(x)[0].view(3, heads, d, w, w)
    expected = torch.zeros(heads, d, w, w, dtype=torch.float64)
    cells = [(row, column) for row in range(w) for column in range(w)]
    for head in range(heads):
        for qh, qw in cells:
            q = qkv[0, head, :, qh, qw]
            scores = torch.stack(
                [
                    q @ qkv[1, head, :, kh, kw] / d**0.5
                    + layer.relative_position_bias[head, (kh - qh + w - 1) * (2 * w - 1) + kw - qw + w - 1]
                    for kh, kw in cells
                ]
            )
            weights = scores.softmax(0)
            expected[head, :, qh, qw] = sum(
                a * qkv[2, head, :, kh, kw] for a, (kh, kw) in zip(weights, cells, strict=True)
            )
    assert torch.allclose(layer(x), layer.to_out(expected.view(1, heads * d, w, w)), atol=1e-12)


def test_position_bias_gradient_counts_every_pair_once():
    w = 4
    table = torch.zeros(2, (2 * w - 1) ** 2, requires_grad=True)
    expand_position_bias(table, w).sum().backward()
    # A displacement of (a, b) occurs (w - |a|)(w - |b|) times among the pairs of a window.
    along = w - torch.arange(-w + 1, w).abs()
    assert torch.equal(table.grad, (along[:, None] * along).flatten().expand(2, -1).float())


def test_averaged_kernel_is_the_mean_of_the_eight_symmetries_of_the_square():
    kernel = torch.rand(2, 3, 5, 5)
    turned = [torch.rot90(kernel, turns, (-2, -1)) for turns in range(4)]
    expected = torch.stack(turned + [turn.flip(-1) for turn in turned]).mean(0)
    averaged = average_over_symmetries(kernel)
    assert torch.allclose(averaged, expected, atol=1e-6)
    assert len(averaged[0, 0].unique()) <= 6  # for 5×5 only 6 of 25 taps differ


def test_half_precision_attention_with_large_scores_is_finite():
    layer = WindowAttention(8, 32, 2, "Naive").to(torch.bfloat16)
    x = 30 * torch.randn(1, 8, 32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        naive = layer(x)
        layer.attn_type = "SDPA"
        assert naive.isfinite().all()
        assert layer(x).isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_precision_training_step_is_finite(name, tiny_network, build_network):
    net = build_network(tiny_network | {"type": name, "upscaling_factor": 4})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sr = net(torch.rand(2, 3, 8, 8))
    sr.float().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_a_block_takes_and_returns_plain_tensors_so_that_it_can_be_checkpointed(net):
    from torch.utils.checkpoint import checkpoint

    x = torch.rand(1, 16, 8, 8, requires_grad=True)
    is_fp = isinstance(net, ESCFP)
    shared = [net.lk_channel, net.lk_spatial] if is_fp else [average_over_symmetries(net.plk_filter)]
    expected = net.blocks[0](x, *shared)
    made = checkpoint(net.blocks[0], x, *shared, use_reentrant=True)
    assert torch.allclose(made, expected, atol=1e-5)
    gradients = []
    for out in (expected, made):
        net.zero_grad()
        out.square().sum().backward(retain_graph=True)
        gradients.append([p.grad.clone() for p in net.blocks[0].parameters()])
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(*gradients, strict=True))


def test_checkpoint_holds_learned_parameters_and_nothing_else(net):
    more = {"to_img.MetaUpsample"} if type(net) is ESCRealM else set()
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()} | more


@pytest.mark.parametrize("variant", VARIANTS)
def test_building_a_published_network_executes_few_operations(build_network, variant):
    # The release built index tables in loops over window positions: millions of operations, seconds.
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counter.operations += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        build_network({**VARIANTS[variant], "upscaling_factor": 4})
    assert Counter.operations < 2000


def test_auto_says_once_which_backend_and_why(tiny_network, build_network, esc_log):
    net = build_network(tiny_network)
    for height in (4, 8):
        net(torch.rand(1, 3, height, 4))
        with torch.no_grad():
            net(torch.rand(1, 3, height, 4))
    assert len(esc_log) == 2
    assert "attn_type auto: Naive to train on cpu" in esc_log[0] and "learns the bias" in esc_log[0]
    assert "attn_type auto: SDPA on cpu" in esc_log[1] and "fused kernel" in esc_log[1]


def test_flex_on_a_cpu_says_once_that_sdpa_trains(tiny_network, build_network, esc_log):
    net = build_network(tiny_network, attn_type="Flex")
    net(torch.rand(1, 3, 4, 4)).sum().backward()
    assert len(esc_log) == 1
    assert "no backward" in esc_log[0] and "SDPA takes over" in esc_log[0]


def test_flex_that_fails_gives_way_to_sdpa_with_a_warning(tiny_network, build_network, esc_log, monkeypatch):
    calls = []

    def failing(device_type):
        def call(*args, **kwargs):
            calls.append(device_type)
            raise RuntimeError("no Triton here")

        return call

    monkeypatch.setattr(attention, "_flex_kernel", failing)
    monkeypatch.setattr(attention, "_flex_failed", set())
    net = build_network(tiny_network, attn_type="Flex").eval()
    lq = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        srs = [net(lq), net(lq)]
        expected = backend(net, "SDPA")(lq)
        assert all(torch.equal(sr, expected) for sr in srs)
    assert calls == ["cpu"]  # what has failed is not tried again
    assert len(esc_log) == 1
    assert "no Triton here" in esc_log[0] and "SDPA takes over" in esc_log[0]


def test_networks_import_and_run_with_torch_alone():
    script = """
import sys, importlib.abc

ABSENT = {"basicsr", "mmengine", "lmdb", "cv2", "yaml", "addict", "numpy", "tqdm", "torchvision"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "basicsr" else real(name, *a)
from esc_basicsr.archs import ESC, ESCFP
import torch
for network in (ESC, ESCFP):
    net = network(2, dim=16, pdim=4, n_blocks=1, window_size=8, num_heads=2)
    print(tuple(net(torch.rand(1, 3, 5, 6)).shape))
assert "basicsr" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["(1, 3, 10, 12)"] * 2
