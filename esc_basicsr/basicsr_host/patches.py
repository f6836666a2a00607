"""What stock BasicSR 1.4.2 breaks on today's stack, mended in one place.

Each mend names what it repairs and where that was reported, asks first whether the BasicSR at hand is sound
in that point (by what it does, not by its version: a vendored or newer one may have it repaired), and then
leaves it alone. `apply` does all of it before anything else imports BasicSR; `active_mends` tells which
mends were needed.
"""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from esc_basicsr.common.errors import UserError
from esc_basicsr.training.checkpoints import load_resume_state, write_torch


@dataclass(frozen=True)
class Mend:
    """One repair of BasicSR.

    Args:
        name: What is mended, in a word or two.
        where: The file of BasicSR, and the issues there that report it.
        is_sound: Whether the BasicSR at hand needs no mend. Touches no GPU.
        apply: Makes it sound.
    """

    name: str
    where: str
    is_sound: Callable[[], bool]
    apply: Callable[[], None]

    @property
    def purpose(self) -> str:
        """What goes wrong without it, in a sentence."""
        return (self.apply.__doc__ or "").strip()


_active: list[Mend] = []


def apply() -> None:
    """Import BasicSR, mending what of it is not sound. Idempotent."""
    for mend in MENDS:
        if not mend.is_sound():
            mend.apply()
            _active.append(mend)


def active_mends() -> tuple[Mend, ...]:
    """The mends that the BasicSR of this process needed, in the order of `MENDS`."""
    return tuple(_active)


# Judging and replacing what BasicSR has


def _host(module_name: str) -> Any:
    return importlib.import_module(f"basicsr.{module_name}")


def _ours(function: Callable[..., Any]) -> bool:
    return (function.__module__ or "").startswith("esc_basicsr.")


def _rebind(name: str, old: object, new: object) -> None:
    """Put ``new`` wherever a loaded module of BasicSR has ``old`` as ``name``: they bind names at import."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "basicsr" and vars(module).get(name) is old:
            setattr(module, name, new)


# What mends replaced in basicsr.train, by name.
_stock_of_train: dict[str, Any] = {}


def _replace_in_train(name: str, new: object) -> None:
    module = _host("train")
    _stock_of_train[name] = getattr(module, name)
    setattr(module, name, new)


def mend_copied_script(script: Any) -> None:
    """Mend a copy of BasicSR's train.py that is run as a script: it has functions of its own."""
    own = getattr(script, "load_resume_state", None)
    if own is not None and not is_resume_sound(own):
        script.load_resume_state = load_resume_state
    for name, stock in _stock_of_train.items():
        own = getattr(script, name, None)
        # one that somebody has changed is theirs
        if own is stock or _same_code(own, stock):
            setattr(script, name, getattr(_host("train"), name))


def _same_code(one: Any, other: Any) -> bool:
    codes = [getattr(function, "__code__", None) for function in (one, other)]
    return all(codes) and all(
        getattr(codes[0], part) == getattr(codes[1], part) for part in ("co_code", "co_names", "co_consts")
    )


class _Cuda:
    """``torch.cuda`` of a machine without a GPU."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"torch.cuda.{name}: no GPU")


class _Torch:
    """Torch on a machine without a GPU."""

    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _works_without_gpu(function: Callable[..., Any], *args: Any, **stand_ins: Any) -> bool:
    """Whether a function of BasicSR ends without an error where there is no GPU.

    Asked of a copy that sees ``stand_ins`` for its module's names, so it has no effect and needs no GPU.
    """
    if _ours(function) or not isinstance(function, types.FunctionType):
        return True
    names = {**function.__globals__, "torch": _Torch(), **stand_ins}
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    try:
        copy(*args)
    except Exception:
        return False
    return True


# torchvision

_FUNCTIONAL_TENSOR = "torchvision.transforms.functional_tensor"


def _functional_tensor_is_there() -> bool:
    if _FUNCTIONAL_TENSOR in sys.modules:
        return True
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None:
        return True  # BasicSR's import says itself that torchvision is missing
    folders = [str(Path(folder) / "transforms") for folder in torchvision.submodule_search_locations or ()]
    return PathFinder.find_spec(_FUNCTIONAL_TENSOR, folders) is not None


def _supply_functional_tensor() -> None:
    """``import basicsr`` fails: it wants a module that torchvision removed in 0.17, for one function."""

    def rgb_to_grayscale(img: torch.Tensor, num_output_channels: int = 1) -> torch.Tensor:
        from torchvision.transforms import functional

        return functional.rgb_to_grayscale(img, num_output_channels)

    module: Any = types.ModuleType(_FUNCTIONAL_TENSOR)
    module.rgb_to_grayscale = rgb_to_grayscale
    sys.modules[_FUNCTIONAL_TENSOR] = module


# Distributed training


def _backend_for(wanted: str) -> str:
    """``wanted``, or gloo where nccl cannot run."""
    return "gloo" if "nccl" in wanted and not torch.cuda.is_available() else wanted


def _init_dist_pytorch(backend: str, port: int | None = None, **kwargs: Any) -> None:
    """Join the processes that torchrun started, with gloo where there is no GPU.

    ``port`` is for SLURM: torchrun has chosen one.
    """
    if "RANK" not in os.environ:
        raise UserError(
            "--launcher pytorch: this process was not started by torchrun (RANK is not set). Start it as "
            "'torchrun --nproc_per_node=N -m esc_basicsr.train -opt FILE --launcher pytorch', "
            "or leave --launcher out for a single process."
        )
    _take_gpu(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    dist.init_process_group(backend=_backend_for(backend), **_store_of_this_attempt(), **kwargs)


def _store_of_this_attempt() -> dict[str, Any]:
    """Where ranks that torchrun has restarted meet, as arguments of ``init_process_group``.

    torchrun gives them the store of the attempt before, in which torch 2.15 finds addresses of dead ranks.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://"))
    attempt = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']} of {world_size} ranks"
    return {"store": PrefixStore(attempt, store), "rank": rank, "world_size": world_size}


def _init_dist_slurm(backend: str, port: int | None = None) -> None:
    """Join the tasks of a SLURM job step, with gloo where there is no GPU.

    The first node's name is asked of ``scontrol`` unless MASTER_ADDR is set; the port is ``port``, else
    MASTER_PORT, else 29500.
    """
    if "SLURM_PROCID" not in os.environ:
        raise UserError(
            "--launcher slurm: this process is not a task of a SLURM job (SLURM_PROCID is not set). "
            "Start it with srun, or leave --launcher out for a single process."
        )
    rank = os.environ["SLURM_PROCID"]
    local_rank = os.environ.get("SLURM_LOCALID", rank)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_node(os.environ["SLURM_NODELIST"])
    if port is not None or "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(port or 29500)
    os.environ.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=os.environ["SLURM_NTASKS"])
    _take_gpu(int(local_rank))
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # torchrun sees to this itself: tasks of one node that each take every core slow one another down.
        torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    dist.init_process_group(backend=_backend_for(backend))


def _take_gpu(local_rank: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def _first_slurm_node(node_list: str) -> str:
    try:
        said = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--launcher slurm: 'scontrol show hostnames {node_list}' failed ({error}). "
            "Set MASTER_ADDR to the name of the first node."
        ) from None
    return said.split()[0]


class _Recorder:
    """Stands in for torch.distributed: fails where it is asked for nccl."""

    def init_process_group(self, backend: str = "gloo", **kwargs: Any) -> None:
        if backend == "nccl":
            raise RuntimeError("nccl: no GPU")


def _is_dist_sound() -> bool:
    module = _host("utils.dist_util")
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NODELIST": "n1", "SLURM_LOCALID": "0"}
    scontrol = types.SimpleNamespace(getoutput=lambda command: "n1")
    return all(
        _works_without_gpu(
            function, "nccl", dist=_Recorder(), os=types.SimpleNamespace(environ=env), subprocess=scontrol
        )
        for function, env in ((module._init_dist_pytorch, torchrun), (module._init_dist_slurm, slurm))
    )


def _mend_dist() -> None:
    """``--launcher pytorch`` and ``slurm`` need a GPU: rank % 0, and the backend is always nccl."""
    # init_dist, which other modules have bound, looks these up when it is called.
    module = _host("utils.dist_util")
    module._init_dist_pytorch = _init_dist_pytorch
    module._init_dist_slurm = _init_dist_slurm


def _is_ddp_sound() -> bool:
    model = types.SimpleNamespace(device=torch.device("cpu"), opt={"dist": True, "num_gpu": 0})

    def wrap(net: torch.nn.Module, device_ids: Any = None, **kwargs: Any) -> torch.nn.Module:
        if device_ids:
            raise ValueError("device_ids on a CPU")
        return net

    function = _host("models.base_model").BaseModel.model_to_device
    return _works_without_gpu(function, model, torch.nn.Identity(), DistributedDataParallel=wrap)


def _mend_ddp() -> None:
    """A distributed network on a CPU fails: it is given the current CUDA device."""
    base_model = _host("models.base_model").BaseModel
    stock = base_model.model_to_device

    def model_to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if not self.opt["dist"] or self.device.type != "cpu":
            return stock(self, net)
        unused = self.opt.get("find_unused_parameters", False)
        return torch.nn.parallel.DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)

    base_model.model_to_device = model_to_device


# Options


def _are_options_sound() -> bool:
    parse_options = _host("utils.options").parse_options
    if _ours(parse_options):
        return True
    code = parse_options.__code__
    return not {"exec", "eval"} & set(code.co_names) and "--local-rank" in code.co_consts


def _mend_options() -> None:
    """Option files and --force_yml can run code; torch.distributed.launch's --local-rank is unknown."""
    stock = _host("utils.options").parse_options

    def parse_options(root_path: str, is_train: bool = True) -> Any:
        from esc_basicsr.basicsr_host import pipeline

        return pipeline.parse_options(stock, root_path, is_train)

    _rebind("parse_options", stock, parse_options)


# Resuming


def is_resume_sound(load_resume_state: Callable[..., Any]) -> bool:
    """Whether this version of ``load_resume_state`` resumes on a CPU, and from under ``root_path``."""
    if _ours(load_resume_state) or not isinstance(load_resume_state, types.FunctionType):
        return True

    class Torch(_Torch):
        def load(self, path: str, map_location: Any = None, **kwargs: Any) -> dict[str, int]:
            return {"iter": 0}

    opt = {"auto_resume": False, "path": {"resume_state": "0.state"}}
    return "experiments" not in load_resume_state.__code__.co_consts and _works_without_gpu(
        load_resume_state, opt, torch=Torch(), check_resume=lambda opt, iteration: None
    )


def _mend_resume() -> None:
    """Resuming needs a GPU; --auto_resume looks under the working directory, and fails at half a file."""
    _host("train").load_resume_state = load_resume_state


# Saving


class _TorchThatSavesWhole:
    """Torch, whose ``save`` leaves a file as it was until the new one is complete and on the disk."""

    def save(self, content: object, path: str) -> None:
        write_torch(path, content)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _is_saving_sound() -> bool:
    """Whether what torch.save is given for a training state is not the file of that name itself."""
    module = _host("models.base_model")
    if isinstance(module.torch, _TorchThatSavesWhole):
        return True
    saved_to = []

    class Torch(_Torch):
        def save(self, content: object, file: Any, **kwargs: Any) -> None:
            saved_to.append(str(getattr(file, "name", file)))

    opt = {"path": {"training_states": "no such folder"}}
    _works_without_gpu(
        inspect.unwrap(module.BaseModel.save_training_state),
        *(types.SimpleNamespace(opt=opt, optimizers=[], schedulers=[]), 0, 1),
        torch=Torch(),
        time=types.SimpleNamespace(sleep=lambda seconds: None),
    )
    return str(Path("no such folder", "1.state")) not in saved_to


def _mend_saving() -> None:
    """Checkpoints are written straight onto their names: a process killed meanwhile leaves half a file."""
    _host("models.base_model").torch = _TorchThatSavesWhole()


def _copies_onto_itself() -> bool:
    copy_opt_file = _host("train").copy_opt_file
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "options.yml"
        file.touch()
        return _works_without_gpu(copy_opt_file, str(file), folder)


def _mend_copy_opt_file() -> None:
    """Every rank copies the option file, its folder there or not; the experiment's own copy is an error."""
    stock = _host("train").copy_opt_file

    def copy_opt_file(opt_file: str, experiments_root: str) -> None:
        copy = Path(experiments_root) / Path(opt_file).name
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first and not (copy.exists() and copy.samefile(opt_file)):
            stock(opt_file, experiments_root)

    _replace_in_train("copy_opt_file", copy_opt_file)


# Logging


def _mend_tensorboard() -> None:
    """TensorBoard shows twice what a resumed run repeats, and numbers that are not finite as if they were."""
    module = _host("utils.logger")

    def init_tb_logger(log_dir: str) -> Any:
        from esc_basicsr.training.tensorboard_writer import TensorBoardWriter

        return TensorBoardWriter(log_dir)

    _rebind("init_tb_logger", module.init_tb_logger, module.master_only(init_tb_logger))


# Data


def _mend_data_order() -> None:
    """A resumed run begins its epoch anew, with other random numbers, which depend on the workers."""
    from esc_basicsr.data.loaders import create_train_val_dataloader

    _replace_in_train("create_train_val_dataloader", create_train_val_dataloader)


def _is_dataloader_sound() -> bool:
    try:
        _host("data").build_dataloader([0], {"phase": "val", "persistent_workers": True})
    except ValueError:
        return False
    return True


def _mend_dataloader() -> None:
    """``persistent_workers`` of a validation set, which has no workers, is an error."""
    stock = _host("data").build_dataloader

    def build_dataloader(dataset: Any, dataset_opt: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if dataset_opt["phase"] != "train" or dataset_opt["num_worker_per_gpu"] == 0:
            dataset_opt = {**dataset_opt, "persistent_workers": False}
        return stock(dataset, dataset_opt, *args, **kwargs)

    _rebind("build_dataloader", stock, build_dataloader)


def _is_prefetcher_sound() -> bool:
    prefetcher = _host("data.prefetch_dataloader").CUDAPrefetcher
    if _ours(prefetcher.__new__):
        return True
    return _works_without_gpu(
        prefetcher.__init__, types.SimpleNamespace(preload=lambda: None), [], {"num_gpu": 0}
    )


def _mend_prefetcher() -> None:
    """``prefetch_mode: cuda`` fails without a GPU."""
    module = _host("data.prefetch_dataloader")

    def new(cls: type, loader: Any, opt: dict[str, Any]) -> Any:
        if opt["num_gpu"] == 0 or not torch.cuda.is_available():
            return module.CPUPrefetcher(loader)
        return object.__new__(cls)

    # A class that makes something else: its name is bound in other modules already.
    module.CUDAPrefetcher.__new__ = new


def _is_lmdb_sound() -> bool:
    names = vars(_host("utils.file_client").LmdbBackend)
    return "__getstate__" in names or "__reduce__" in names


def _mend_lmdb() -> None:
    """A data set whose LMDB was read cannot go to spawned workers; two cannot share an LMDB."""
    from esc_basicsr.data.lmdb_reader import shared_environment

    backend = _host("utils.file_client").LmdbBackend

    # Opened read-only and shared, whatever options say: LMDB allows one environment of a file in a process.
    def init(self: Any, db_paths: Any, client_keys: Any = "default", **options: Any) -> None:
        paths = db_paths if isinstance(db_paths, list) else [db_paths]
        keys = client_keys if isinstance(client_keys, list) else [client_keys]
        if len(keys) != len(paths):
            raise ValueError(f"expected as many client_keys as db_paths, got {keys} and {paths}")
        self.db_paths = [str(path) for path in paths]
        self._keys = keys
        self._client, self._pid = {}, None

    def get(self: Any, filepath: Any, client_key: str) -> Any:
        if self._pid != os.getpid():
            self._client = {
                key: shared_environment(Path(path))
                for key, path in zip(self._keys, self.db_paths, strict=True)
            }
            self._pid = os.getpid()
        with self._client[client_key].begin() as transaction:
            return transaction.get(str(filepath).encode("ascii"))

    def getstate(self: Any) -> dict[str, Any]:
        return {**vars(self), "_client": {}, "_pid": None}

    backend.__init__ = init
    backend.get = get
    backend.__getstate__ = getstate


MENDS = (
    Mend(
        "functional_tensor",
        "basicsr/data/degradations.py; BasicSR #533, #649, #663",
        _functional_tensor_is_there,
        _supply_functional_tensor,
    ),
    Mend("distributed set-up on a CPU", "basicsr/utils/dist_util.py", _is_dist_sound, _mend_dist),
    Mend("DDP on a CPU", "basicsr/models/base_model.py", _is_ddp_sound, _mend_ddp),
    Mend("options", "basicsr/utils/options.py; BasicSR #626", _are_options_sound, _mend_options),
    Mend(
        "resume",
        "basicsr/train.py",
        lambda: is_resume_sound(_host("train").load_resume_state),
        _mend_resume,
    ),
    Mend("whole checkpoints", "basicsr/models/base_model.py", _is_saving_sound, _mend_saving),
    Mend("option file's copy", "basicsr/utils/options.py", _copies_onto_itself, _mend_copy_opt_file),
    Mend(
        "TensorBoard",
        "basicsr/utils/logger.py",
        lambda: _ours(_host("utils.logger").init_tb_logger),
        _mend_tensorboard,
    ),
    Mend(
        "data order",
        "basicsr/train.py",
        lambda: _ours(_host("train").create_train_val_dataloader),
        _mend_data_order,
    ),
    Mend("persistent_workers", "basicsr/data/__init__.py", _is_dataloader_sound, _mend_dataloader),
    Mend("CUDAPrefetcher", "basicsr/data/prefetch_dataloader.py", _is_prefetcher_sound, _mend_prefetcher),
    Mend("LMDB clients", "basicsr/utils/file_client.py", _is_lmdb_sound, _mend_lmdb),
)
