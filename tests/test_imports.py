"""Importing is light, by what is imported; and BasicSR knows ESC however it is imported itself."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

HEAVY = {"torch", "basicsr", "torchvision", "cv2", "mmengine", "numpy", "matplotlib", "PIL", "lmdb"}


def imported_by(*arguments: str) -> set[str]:
    """The top-level packages in sys.modules after Python was run with ``arguments``."""
    listing = "import sys, atexit; atexit.register(lambda: print('\\n' + ' '.join(sys.modules)))\n"
    if arguments[0] == "-c":
        code = listing + arguments[1]
    else:
        code = f"{listing}import runpy; sys.argv = {['x', *arguments[2:]]!r}\n"
        code += f"runpy.run_module({arguments[1]!r}, run_name='__main__', alter_sys=True)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in result.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_the_command_line_explains_itself_without_heavy_packages(flag):
    assert not imported_by("-m", "esc_basicsr", flag) & HEAVY


def test_the_package_is_light():
    assert not imported_by("-c", "import esc_basicsr") & HEAVY


def test_the_networks_need_pytorch_alone():
    loaded = imported_by("-c", "from esc_basicsr.archs import ESC")
    assert "torch" in loaded
    assert not loaded & {"basicsr", "torchvision", "cv2", "mmengine", "matplotlib", "lmdb", "PIL"}


def test_a_data_worker_imports_what_it_needs():
    loaded = imported_by("-c", "import esc_basicsr.data.dflip_dataset")
    assert {"torch", "lmdb", "cv2"} <= loaded
    assert not loaded & {"basicsr", "torchvision", "mmengine", "matplotlib", "tensorboard"}


# Has imported what takes seconds, and nothing of BasicSR or of this package; runs each program in a fork.
SERVER = """
import json, os, sys, tempfile, traceback, warnings
import torch, torchvision, cv2, scipy.ndimage, mmengine, tensorboard.compat.proto.event_pb2
assert not {"basicsr", "esc_basicsr", "wrapt"} & sys.modules.keys()
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as output:
        process = os.fork()
        if not process:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                exec(json.loads(line), {"__name__": "__main__"})
                sys.stderr.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        print(json.dumps((code, output.read())), flush=True)
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[str], tuple[int, str]]]:
    """Run a program in a process that has imported nothing of BasicSR; gives exit code and output."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SERVER], text=True, **pipes) as server:

        def run(program: str) -> tuple[int, str]:
            server.stdin.write(f"{json.dumps(program)}\n")
            server.stdin.flush()
            return tuple(json.loads(server.stdout.readline()))

        yield run
        server.kill()


@pytest.mark.parametrize(
    "statement",
    [
        "import basicsr",
        "import basicsr.utils.registry",
        "from basicsr.train import train_pipeline",
        "from basicsr.archs import build_network",
        "from esc_basicsr.training.esc_model import ESCModel",
        "import esc_basicsr.basicsr_host.pipeline",
        "import esc_basicsr.basicsr_host.patches",
        "import esc_basicsr.training.checkpoints",
    ],
)
def test_basicsr_knows_esc_however_it_is_imported(statement, fresh):
    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        f"import esc_basicsr\n{statement}\n"
        "from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY\n"
        "for name in ('ESC', 'ESCFP', 'Bicubic', 'HiT_SRF'): ARCH_REGISTRY.get(name)\n"
        "DATASET_REGISTRY.get('DFLIPDataset'), LOSS_REGISTRY.get('YChannelL1Loss')\n"
        "MODEL_REGISTRY.get('ESCModel')\n"
    )
    exit_code, output = fresh(code)
    assert exit_code == 0, output


def test_a_name_that_another_package_has_taken_registers_nothing_of_esc_and_says_so(fresh):
    code = (
        "import esc_basicsr.basicsr_host.functional_tensor as f; f.provide_functional_tensor()\n"
        "import sys; sys.meta_path[:] = [m for m in sys.meta_path if 'wrapt' not in type(m).__module__]\n"
        "from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY\n"
        "ARCH_REGISTRY.register(type('ESCFP', (), {}))\n"
        "from esc_basicsr.basicsr_host.registration import register; import basicsr; register(basicsr)\n"
        "assert 'ESC' not in ARCH_REGISTRY and 'ESCModel' not in MODEL_REGISTRY\n"
        "import esc_basicsr.lab.networks.registration as baselines; baselines.register(basicsr)\n"
        "assert 'HiT_SRF' in ARCH_REGISTRY\n"
    )
    exit_code, output = fresh(code)
    assert exit_code == 0, output
    assert "ESCFP is registered with BasicSR already" in output


def test_baselines_that_cannot_be_registered_do_not_keep_esc_out(fresh):
    code = (
        "import esc_basicsr.basicsr_host.functional_tensor as f; f.provide_functional_tensor()\n"
        "import sys; sys.meta_path[:] = [m for m in sys.meta_path if 'wrapt' not in type(m).__module__]\n"
        "from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY\n"
        "ARCH_REGISTRY.register(type('HiT_SRF', (), {}))\n"
        "import basicsr, esc_basicsr.lab.networks.registration as baselines; baselines.register(basicsr)\n"
        "from esc_basicsr.basicsr_host.registration import register; register(basicsr)\n"
        "assert 'ESC' in ARCH_REGISTRY and 'ESCModel' in MODEL_REGISTRY\n"
        "assert 'MambaIRv2Light' not in ARCH_REGISTRY\n"
    )
    exit_code, output = fresh(code)
    assert exit_code == 0, output
    assert "baselines are not registered" in output
