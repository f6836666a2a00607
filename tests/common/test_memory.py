"""Memory there is: a container's limit counts, what files' pages take of it does not."""

from pathlib import Path

import psutil
import pytest
import torch

from esc_basicsr.common import memory
from esc_basicsr.common.memory import available_memory, is_out_of_memory

CPU = torch.device("cpu")
V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def group(folder: Path, files: tuple[str, str, str], limit: str, used: int, pages: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files[0]).write_text(f"{limit}\n")
    (folder / files[1]).write_text(f"{used}\n")
    statistics = f"anon 5\n{files[2]}active_file {pages // 2}\n{files[2]}inactive_file {pages - pages // 2}\n"
    (folder / "memory.stat").write_text(statistics)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "cgroup")
    return tmp_path


def test_without_limits_it_is_the_machines(root: Path) -> None:
    machine = psutil.virtual_memory().available
    assert available_memory(CPU) == pytest.approx(machine, rel=0.2)  # no such file: not Linux
    (root / "cgroup").write_text("0::/\n")
    assert available_memory(CPU) == pytest.approx(machine, rel=0.2)
    group(root, V2, "max", 0)
    assert available_memory(CPU) == pytest.approx(machine, rel=0.2)


def test_limit_of_the_group_or_of_one_above_counts_and_pages_of_files_do_not(root: Path) -> None:
    (root / "cgroup").write_text("0::/slurm/job/step\n")
    group(root / "slurm" / "job" / "step", V2, "max", 700)
    group(root / "slurm" / "job", V2, "1000", 700, pages=401)
    assert available_memory(CPU) == 701
    group(root / "slurm", V2, "900", 850)
    assert available_memory(CPU) == 50
    group(root / "slurm", V2, "900", 950)
    assert available_memory(CPU) == 0


def test_first_version_of_control_groups_counts_as_well(root: Path) -> None:
    (root / "cgroup").write_text("5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1\n")
    group(root / "memory" / "docker" / "1", V1, "2000", 1500, pages=300)
    group(root / "memory", V1, str(2**63 - 4096), 5000)
    assert available_memory(CPU) == 800


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=str,
)
def test_want_of_memory_is_recognized(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_pytorch_raises_where_the_cpus_memory_is_not_enough_is_recognized() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
