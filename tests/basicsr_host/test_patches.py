"""What stock BasicSR breaks, each patch by the issue that reports it.

The symptoms are shown in a process of their own, before and after the patches: see stock_basicsr.py.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import basicsr.train
import lmdb
import pytest
import stock_basicsr
import torch
import torch.distributed as dist
from basicsr.data import build_dataloader
from basicsr.utils import FileClient, dist_util

from esc_basicsr.basicsr_host import patches
from esc_basicsr.common.errors import UserError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = tmp_path_factory.mktemp("symptoms") / "result.json"
    environment = {
        **os.environ,
        **{
            "RESULT": str(result),
            "FREE_PORT": str(free_port()),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
    }
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock_basicsr.py"))],
        env=environment,
        check=True,
        capture_output=True,
    )
    return json.loads(result.read_text())


@pytest.mark.parametrize("name", [symptom.__name__ for symptom in stock_basicsr.SYMPTOMS])
def test_symptom_is_seen_only_without_its_patch(shown: dict[str, Any], name: str) -> None:
    patch, before, after = shown["symptoms"][name]
    assert after is None
    # A patch is needed where, and only where, one of its symptoms is seen.
    of_this_patch = [entry for entry in shown["symptoms"].values() if entry[0] == patch]
    assert any(entry[1] for entry in of_this_patch) == (patch in shown["needed"])
    if before is not None:
        assert patch in shown["active"]


def test_every_patch_has_a_symptom() -> None:
    assert {patch.name for patch in patches.PATCHES} == set(stock_basicsr.SYMPTOMS.values())


def test_applying_twice_is_applying_once(shown: dict[str, Any]) -> None:
    assert shown["applied_again"] == 0
    assert shown["still_needed"] == []


def test_active_patches_say_what_and_where() -> None:
    for patch in patches.active():
        assert patch in (patches.FUNCTIONAL_TENSOR, *patches.PATCHES)
        assert patch.where.startswith("basicsr/")
        assert patch.purpose.endswith(".")


def test_sound_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BasicSR that handles a machine without GPU itself keeps its own functions."""

    def init(backend: str, **kwargs: Any) -> None:
        if torch.cuda.device_count():
            torch.cuda.set_device(0)
        dist.init_process_group(backend=backend if torch.cuda.is_available() else "gloo")

    def resume(opt: dict[str, Any]) -> Any:
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        return torch.load(opt["path"]["resume_state"], map_location=device)

    monkeypatch.setattr(dist_util, "_init_dist_pytorch", init)
    monkeypatch.setattr(basicsr.train, "load_resume_state", resume)
    before = patches.active()
    patches.apply()
    assert patches.active() == before
    assert dist_util._init_dist_pytorch is init
    assert basicsr.train.load_resume_state is resume


def test_functional_tensor_gives_torchvisions_own_grayscale() -> None:
    from torchvision.transforms import functional
    from torchvision.transforms.functional_tensor import rgb_to_grayscale

    image = torch.rand(2, 3, 4, 5)
    for channels in (1, 3):
        torch.testing.assert_close(
            rgb_to_grayscale(image, num_output_channels=channels),
            functional.rgb_to_grayscale(image, num_output_channels=channels),
        )


# SLURM


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A job step of one task; `scontrol` says that the first node is this machine."""
    stub = tmp_path / "scontrol"
    stub.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames node[1-2]' ] && printf 'localhost\\nnode2\\n'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "overwritten")  # so that they are put back as they were
        monkeypatch.delenv(name)
    job = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NODELIST": "node[1-2]"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist_util.mp, "set_start_method", lambda method: None)
    threads = torch.get_num_threads()
    yield lambda **params: dist_util.init_dist("slurm", **params)
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def test_slurm_task_joins_at_the_first_node(
    slurm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    port = free_port()
    slurm(backend="nccl", port=port)
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("localhost", str(port))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("port", "in_environment", "chosen"),
    [(12345, "23456", "12345"), (None, "23456", "23456"), (None, "", "29500")],
)
def test_slurm_port_is_the_options_then_the_environments(
    slurm: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    port: int | None,
    in_environment: str,
    chosen: str,
) -> None:
    monkeypatch.setattr(patches.dist, "init_process_group", lambda backend: None)
    if in_environment:
        monkeypatch.setenv("MASTER_PORT", in_environment)
    slurm(port=port)
    assert os.environ["MASTER_PORT"] == chosen


def test_slurm_without_scontrol_asks_for_master_addr(
    slurm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NODELIST", "node9")  # which the stub does not know
    with pytest.raises(UserError, match=r"scontrol show hostnames node9.*Set MASTER_ADDR"):
        slurm()


def test_distributed_network_on_cuda_is_left_to_basicsr(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch of DDP takes over on a CPU alone; a network on one GPU goes BasicSR's way."""
    from basicsr.models.base_model import BaseModel

    net = torch.nn.Linear(1, 1)
    model = SimpleNamespace(device=torch.device("cpu"), opt={"dist": False, "num_gpu": 0})
    assert BaseModel.model_to_device(model, net) is net


def test_patch_that_does_not_fit_is_a_warning_and_keeps_no_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = []

    def fail() -> None:
        raise AttributeError("no such thing")

    strange = patches.Patch("strange", "basicsr/x.py", "It fails.", lambda: True, fail)
    plain = patches.Patch("plain", "basicsr/y.py", "It fails.", lambda: True, lambda: applied.append("plain"))
    monkeypatch.setattr(patches, "PATCHES", [strange, plain])
    monkeypatch.setattr(patches, "_active", [])
    with pytest.warns(UserWarning, match="not patched: strange .*no such thing"):
        patches.apply()
    assert (applied, patches.active()[-1]) == (["plain"], plain)
    assert strange not in patches.active()


# Data


@pytest.mark.parametrize("phase", ["val", "train"])
def test_persistent_workers_without_workers_is_no_error(phase: str) -> None:
    options = {"phase": phase, "persistent_workers": True, "num_worker_per_gpu": 0, "batch_size_per_gpu": 2}
    loader = build_dataloader([1, 2, 3, 4], options)
    assert len(loader) == {"val": 4, "train": 2}[phase]


def test_persistent_workers_are_kept_where_there_are_workers() -> None:
    options = {"phase": "train", "persistent_workers": True, "num_worker_per_gpu": 1, "batch_size_per_gpu": 1}
    assert build_dataloader([1, 2], options).persistent_workers


@pytest.fixture
def lmdb_folder(tmp_path: Path) -> str:
    path = str(tmp_path / "x.lmdb")
    with lmdb.open(path, map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    return path


def test_lmdb_client_reads_after_a_fork(lmdb_folder: str) -> None:
    """Both sides of the fork go on reading, the child by an environment of its own."""
    client = FileClient("lmdb", db_paths=[lmdb_folder, lmdb_folder], client_keys=["lq", "gt"])
    assert client.get("key", "gt") == b"value"
    inherited = client.client._client["gt"]
    child = os.fork()
    if child == 0:
        own = client.get("key", "gt") == b"value" and client.client._client["gt"] is not inherited
        os._exit(0 if own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert client.get("key", "lq") == b"value"
    assert client.client._client["gt"] is inherited


def test_lmdb_client_refuses_paths_and_keys_that_do_not_pair(lmdb_folder: str) -> None:
    with pytest.raises(ValueError, match=r"as many client_keys as db_paths, got \['lq', 'gt'\]"):
        FileClient("lmdb", db_paths=[lmdb_folder], client_keys=["lq", "gt"])
