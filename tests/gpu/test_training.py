"""On a GPU a step compiles, gradients are shared by nccl, and a training ends well, killed or not."""

import copy
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from esc_basicsr import fast
from esc_basicsr.fast import gpu
from esc_basicsr.lab.measure.training_step import Step, largest_relative_difference

ITERATIONS = 200


@pytest.fixture
def batch():
    return torch.rand(4, 3, 12, 12, device="cuda"), torch.rand(4, 3, 24, 24, device="cuda")


def gradients(net, batch, dtype=None):
    step = Step(net, *batch, dtype)
    step()
    return step.gradients()


@pytest.fixture
def net(lively_network):
    return lively_network().cuda().requires_grad_(True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-3), (torch.bfloat16, 0.3)], ids=["float32", "bfloat16"]
)
def test_a_compiled_step_has_the_gradients_of_the_plain_one(net, batch, dtype, tolerance):
    expected = gradients(copy.deepcopy(net), batch)
    net.compile()
    assert largest_relative_difference(gradients(net, batch, dtype), expected, "") < tolerance


@pytest.fixture
def nccl(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_by_nccl_has_the_gradients_of_one_process(net, batch, nccl):
    expected = gradients(copy.deepcopy(net), batch)
    fast.attend_by_kernels(net)
    made = gradients(DistributedDataParallel(net, device_ids=[0]), batch)
    made = {name.removeprefix("module."): gradient for name, gradient in made.items()}
    assert largest_relative_difference(made, expected, "") < 1e-3
    assert not gpu.take_failures()


@pytest.fixture
def options(tmp_path):
    """Options of a training whose batches are prefetched to the GPU."""
    pytest.importorskip("basicsr")
    from tiny_training import paired, training_options, write_images

    write_images(tmp_path / "train", count=9, height=32, width=40)
    write_images(tmp_path / "val", count=2, height=24, width=32)
    more = {"gt_size": 16, "use_hflip": True, "use_rot": True, "prefetch_mode": "cuda", "pin_memory": True}
    train = paired("Train", tmp_path / "train", ".lmdb", **more)
    options = training_options(train, paired("Val", tmp_path / "val"))
    options["num_gpu"] = 1
    options["train"]["total_iter"] = ITERATIONS
    options["val"]["val_freq"] = options["logger"]["save_checkpoint_freq"] = 50
    return options


def test_a_training_that_is_killed_goes_on_and_ends_as_one_that_was_not(options, tmp_path):
    from tiny_training import checkpoint, start_python, write

    def train(folder, *arguments):
        folder.mkdir(exist_ok=True)
        write(folder / "train.yml", options)
        call = ["-m", "esc_basicsr", "train", "-opt", "train.yml", *arguments]
        return start_python(*call, cwd=folder, gpus="0")

    def finish(process):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    finish(train(tmp_path / "whole"))
    killed = train(tmp_path / "killed")
    first = tmp_path / "killed/experiments/single/training_states/50.state"
    deadline = time.monotonic() + 300
    while not first.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert first.exists()
    finish(train(tmp_path / "killed", "--auto_resume"))
    ends = [
        checkpoint(tmp_path / name / "experiments/single", ITERATIONS)["weights"]["params_ema"]
        for name in ("whole", "killed")
    ]
    for key, expected in ends[0].items():
        # atomic additions on a GPU come in any order
        torch.testing.assert_close(ends[1][key], expected, rtol=1e-3, atol=1e-4)
