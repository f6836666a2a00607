"""Patches for what stock BasicSR 1.4.2 breaks on today's stack, in one place.

Each patch names what it repairs and where that was reported, looks first whether the BasicSR at hand needs it
(by what its code does, not by its version: a vendored or newer one may have it repaired), and then leaves it
alone. `apply` does all of it once BasicSR is imported; `active` lists which patches were needed.
"""

import functools
import importlib
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist

from esc_basicsr.basicsr_host import functional_tensor
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger


@dataclass(frozen=True)
class Patch:
    """One repair of BasicSR.

    Args:
        name: What is repaired, in a word or two.
        where: The file of BasicSR, and the issues there that report it.
        purpose: What goes wrong without it, in a sentence.
        is_needed: Tells whether the BasicSR at hand needs it. Touches no GPU.
        apply: Repairs it.
    """

    name: str
    where: str
    purpose: str
    is_needed: Callable[[], bool]
    apply: Callable[[], None]


# The one that must be in place before BasicSR is imported.
FUNCTIONAL_TENSOR = Patch(
    "functional_tensor",
    "basicsr/data/degradations.py; BasicSR #533, #649, #663",
    f"BasicSR imports {functional_tensor.NAME}, which torchvision has removed.",
    functional_tensor.is_provided,
    functional_tensor.provide_functional_tensor,
)
PATCHES: list[Patch] = []
_active: list[Patch] = []


def _patch(
    name: str, where: str, purpose: str, is_needed: Callable[[], bool]
) -> Callable[[Callable[[], None]], None]:
    """Add the function below to `PATCHES`."""
    return lambda function: PATCHES.append(Patch(name, where, purpose, is_needed, function))


def apply() -> None:
    """Patch what of BasicSR needs it. Idempotent; a patch that does not fit this BasicSR is a warning."""
    for patch in PATCHES:
        try:
            if patch.is_needed():
                patch.apply()
                _active.append(patch)
        except (ImportError, AttributeError, LookupError, TypeError, ValueError) as error:
            message = (
                f"This BasicSR is not patched: {patch.name} ({patch.where}: {error}). {patch.purpose} "
                "esc_basicsr knows BasicSR 1.4.2."
            )
            warnings.warn(message, stacklevel=2)


def active() -> tuple[Patch, ...]:
    """List the patches that the BasicSR of this process needed, in their order."""
    return (*([FUNCTIONAL_TENSOR] * FUNCTIONAL_TENSOR.is_needed()), *_active)


# Judging and replacing what BasicSR has


def _host(module_name: str) -> Any:
    return importlib.import_module(f"basicsr.{module_name}")


def _is_ours(function: Callable[..., Any]) -> bool:
    return (function.__module__ or "").startswith("esc_basicsr.")


def _mentions(function: Callable[..., Any], *names: str) -> bool:
    """Tell whether a function's code, what is nested in it included, uses one of the names or texts."""

    def of(code: CodeType) -> bool:
        nested = any(of(constant) for constant in code.co_consts if isinstance(constant, CodeType))
        return nested or bool({*code.co_names, *map(str, code.co_consts)} & {*names})

    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and of(code)


def _needs_gpu(function: Callable[..., Any]) -> bool:
    """Tell whether a function of BasicSR takes the current GPU without asking whether there is one."""
    takes = _mentions(function, "current_device", "set_device", "Stream")
    return takes and not _is_ours(function) and not _mentions(function, "is_available")


def _rebind(name: str, old: object, new: object) -> None:
    """Put ``new`` wherever a loaded module of BasicSR has ``old`` as ``name``: they bind names at import."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "basicsr" and vars(module).get(name) is old:
            setattr(module, name, new)


# What patches replaced in basicsr.train, by name.
_stock_of_train: dict[str, Any] = {}


def _ours_of_training(name: str) -> Any:
    # Imported late: it imports BasicSR, whose import applies these patches.
    from esc_basicsr.training import checkpoints

    return getattr(checkpoints, name)


def _replace_in_train(name: str, new: object) -> None:
    module = _host("train")
    _stock_of_train[name] = getattr(module, name)
    setattr(module, name, new)


def patch_copied_script(script: Any) -> None:
    """Patch a copy of BasicSR's train.py that is run as a script: it has functions of its own."""
    own = getattr(script, "load_resume_state", None)
    if own is not None and _is_resume_broken(own):
        script.load_resume_state = _ours_of_training("load_resume_state")
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


# Distributed training


def _backend_for(wanted: str) -> str:
    """Return ``wanted``, or gloo where nccl cannot run."""
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
    dist.init_process_group(backend=_backend_for(backend), **kwargs)


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


@_patch(
    "distributed set-up on a CPU",
    "basicsr/utils/dist_util.py",
    "``--launcher pytorch`` and ``slurm`` need a GPU: rank % 0, and the backend is always nccl.",
    lambda: _needs_gpu(_host("utils.dist_util")._init_dist_pytorch),
)
def _patch_dist() -> None:
    # init_dist, which other modules have bound, looks these up when it is called.
    module = _host("utils.dist_util")
    module._init_dist_pytorch = _init_dist_pytorch
    module._init_dist_slurm = _init_dist_slurm


@_patch(
    "DDP on a CPU",
    "basicsr/models/base_model.py",
    "A distributed network on a CPU fails: it is given the current CUDA device.",
    lambda: _needs_gpu(_host("models.base_model").BaseModel.model_to_device),
)
def _patch_ddp() -> None:
    base_model = _host("models.base_model").BaseModel
    stock = base_model.model_to_device

    def model_to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if not self.opt["dist"] or self.device.type != "cpu":
            return stock(self, net)
        unused = self.opt.get("find_unused_parameters", False)
        return torch.nn.parallel.DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)

    base_model.model_to_device = model_to_device


# Options


@_patch(
    "options",
    "basicsr/utils/options.py; BasicSR #626",
    "Option files and --force_yml can run code; torch.distributed.launch's --local-rank is unknown.",
    lambda: _mentions(_host("utils.options").parse_options, "exec", "eval"),
)
def _patch_options() -> None:
    def parse_options(root_path: str, is_train: bool = True) -> Any:
        from esc_basicsr.basicsr_host import parse

        parsed = parse.parse_options(root_path, is_train)
        patch_copied_script(sys.modules["__main__"])
        return parsed

    _rebind("parse_options", _host("utils.options").parse_options, parse_options)


# Resuming


def _is_resume_broken(function: Callable[..., Any]) -> bool:
    """Tell whether this ``load_resume_state`` needs a GPU, or looks under the working directory."""
    return not _is_ours(function) and (_needs_gpu(function) or _mentions(function, "experiments"))


@_patch(
    "resume",
    "basicsr/train.py",
    "Resuming needs a GPU; --auto_resume looks under the working directory, and fails at half a file.",
    lambda: _is_resume_broken(_host("train").load_resume_state),
)
def _patch_resume() -> None:
    _host("train").load_resume_state = _ours_of_training("load_resume_state")


# Files


@_patch(
    "option file's copy",
    "basicsr/utils/options.py",
    "Every rank copies the option file, its folder there or not; the experiment's own copy is an error.",
    lambda: not _mentions(_host("train").copy_opt_file, "samefile"),
)
def _patch_copy_opt_file() -> None:
    stock = _host("train").copy_opt_file

    def copy_opt_file(opt_file: str, experiments_root: str) -> None:
        copy = Path(experiments_root) / Path(opt_file).name
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first and not (copy.exists() and copy.samefile(opt_file)):
            stock(opt_file, experiments_root)

    _replace_in_train("copy_opt_file", copy_opt_file)


# Models


def _ours_of_models() -> Any:
    from esc_basicsr.basicsr_host import models  # imports BasicSR

    return models


def _put_in_place(cls: Any, *names: str) -> None:
    for name in names:
        setattr(cls, name, getattr(_ours_of_models(), name))


def _classes_with(method: str) -> Iterator[Any]:
    """List BasicSR's models that have a method of their own."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("basicsr.models."):
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == module_name and method in vars(cls):
                    yield cls


@_patch(
    "checkpoints and optimizers of every model",
    "basicsr/models/base_model.py",
    "Models read .pth alone, no network by its name, none of another scale; a process that is killed leaves "
    "half a file; they know no optimizer but Adam.",
    lambda: not _is_ours(_host("models.base_model").BaseModel.load_network),
)
def _patch_loading() -> None:
    _put_in_place(_host("models.base_model").BaseModel, "load_network", "save_network", "get_optimizer")


@_patch(
    "states of every model",
    "basicsr/models/base_model.py",
    "A state lacks random numbers, the position in the data and Real-ESRGAN's pool of pairs: a resumed "
    "training goes another way. SIGTERM and Ctrl-C end a training without a state.",
    lambda: not _is_ours(_host("models.base_model").BaseModel.save_training_state),
)
def _patch_states() -> None:
    models = _ours_of_models()
    base = _host("models.base_model").BaseModel
    base.__init__ = models.prepared(base.__init__)
    base.update_learning_rate = models.stopping_first(base.update_learning_rate)
    _put_in_place(base, "save_training_state", "resume_training")
    for name in ("training_step", "training_state", "shared_validation"):
        made = functools.cached_property(getattr(models, name))
        made.__set_name__(base, name)
        setattr(base, name, made)
    for cls in _classes_with("feed_data"):
        cls.feed_data = models.noting_position(cls.feed_data)


@_patch(
    "steps of every model",
    "basicsr/models/sr_model.py, srgan_model.py, esrgan_model.py, realesrgan_model.py",
    "Models know neither half precision nor accumulation, and go on from losses that are no numbers.",
    lambda: not hasattr(_host("models.sr_model").SRModel.optimize_parameters, "__wrapped__"),
)
def _patch_steps() -> None:
    for cls in _classes_with("optimize_parameters"):
        if cls.__name__ in ("SRModel", "SRGANModel", "ESRGANModel", "RealESRGANModel"):
            cls.optimize_parameters = _ours_of_models().in_pieces(cls.optimize_parameters)


@_patch(
    "validation of every model",
    "basicsr/models/sr_model.py",
    "One rank validates while the others wait; HR images that a set lacks are an error.",
    lambda: not _is_ours(_host("models.sr_model").SRModel.nondist_validation),
)
def _patch_validation() -> None:
    cls, ours = _host("models.sr_model").SRModel, _ours_of_models()
    ours.nondist_validation.__wrapped__ = cls.nondist_validation  # `has_ours` asks, and tests compare
    _put_in_place(cls, "dist_validation", "nondist_validation", "upscale_batch")


@_patch(
    "degradations",
    "basicsr/models/realesrnet_model.py, realesrgan_model.py; basicsr/utils/img_process_util.py",
    "RealESRNetModel and RealESRGANModel need a GPU, and blur images alone that are contiguous.",
    lambda: any(_needs_cuda(cls) for cls in _real_world_models()),
)
def _patch_degradations() -> None:
    for cls in filter(_needs_cuda, _real_world_models()):
        for name in ("__init__", "_dequeue_and_enqueue"):
            setattr(cls, name, _ours_of_models().on_its_device(vars(cls)[name]))
    blur = _host("utils.img_process_util").filter2D
    _rebind("filter2D", blur, lambda img, kernel: blur(img.contiguous(), kernel))


def _real_world_models() -> list[Any]:
    return [
        _host("models.realesrnet_model").RealESRNetModel,
        _host("models.realesrgan_model").RealESRGANModel,
    ]


def _needs_cuda(cls: Any) -> bool:
    return not _is_ours(cls.__init__) and _mentions(cls.__init__, "cuda")


# Logging


@_patch(
    "TensorBoard",
    "basicsr/utils/logger.py",
    "TensorBoard shows twice what a resumed run repeats, and NaN as if it were a number.",
    lambda: not _is_ours(_host("utils.logger").init_tb_logger),
)
def _patch_tensorboard() -> None:
    module = _host("utils.logger")

    def init_tb_logger(log_dir: str) -> Any:
        from esc_basicsr.training.tensorboard_writer import TensorBoardWriter

        return TensorBoardWriter(log_dir)

    _rebind("init_tb_logger", module.init_tb_logger, module.master_only(init_tb_logger))


# Data


@_patch(
    "data order",
    "basicsr/train.py",
    "A resumed run begins its epoch anew, with other random numbers, which depend on the workers.",
    lambda: not _is_ours(_host("train").create_train_val_dataloader),
)
def _patch_data_order() -> None:
    from esc_basicsr.data.loaders import create_train_val_dataloader

    _replace_in_train("create_train_val_dataloader", create_train_val_dataloader)


def _is_dataloader_broken() -> bool:
    try:
        _host("data").build_dataloader([0], {"phase": "val", "persistent_workers": True})
    except ValueError:
        return True
    return False


@_patch(
    "persistent_workers",
    "basicsr/data/__init__.py",
    "``persistent_workers`` of a validation set, which has no workers, is an error.",
    _is_dataloader_broken,
)
def _patch_dataloader() -> None:
    stock = _host("data").build_dataloader

    def build_dataloader(dataset: Any, dataset_opt: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if dataset_opt["phase"] != "train" or dataset_opt["num_worker_per_gpu"] == 0:
            dataset_opt = {**dataset_opt, "persistent_workers": False}
        return stock(dataset, dataset_opt, *args, **kwargs)

    _rebind("build_dataloader", stock, build_dataloader)


@_patch(
    "CUDAPrefetcher",
    "basicsr/data/prefetch_dataloader.py",
    "``prefetch_mode: cuda`` fails without a GPU.",
    lambda: _needs_gpu(_host("data.prefetch_dataloader").CUDAPrefetcher.__init__),
)
def _patch_prefetcher() -> None:
    module = _host("data.prefetch_dataloader")
    cuda, cpu = module.CUDAPrefetcher, module.CPUPrefetcher
    stock = {name: getattr(cuda, name) for name in ("__init__", "next", "reset")}

    def init(self: Any, loader: Any, opt: dict[str, Any]) -> None:
        self.opt, self.stream = opt, None
        if opt["num_gpu"] == 0 or not torch.cuda.is_available():
            cpu.__init__(self, loader)
        else:
            stock["__init__"](self, loader, opt)

    def step(name: str) -> Callable[[Any], Any]:
        return lambda self: (getattr(cpu, name) if self.stream is None else stock[name])(self)

    cuda.__init__, cuda.next, cuda.reset = init, step("next"), step("reset")


def _is_lmdb_bound_to_its_process() -> bool:
    return not {"__getstate__", "__reduce__"} & vars(_host("utils.file_client").LmdbBackend).keys()


@_patch(
    "LMDB clients",
    "basicsr/utils/file_client.py",
    "A data set whose LMDB was read cannot go to spawned workers; two cannot share an LMDB.",
    _is_lmdb_bound_to_its_process,
)
def _patch_lmdb() -> None:
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
        open_here(self)

    def open_here(self: Any) -> None:
        self._client = {
            key: shared_environment(Path(path)) for key, path in zip(self._keys, self.db_paths, strict=True)
        }
        self._pid = os.getpid()

    def get(self: Any, filepath: Any, client_key: str) -> Any:
        if self._pid != os.getpid():  # a process that was forked, or that this was sent to
            open_here(self)
        with self._client[client_key].begin() as transaction:
            return transaction.get(str(filepath).encode("ascii"))

    def getstate(self: Any) -> dict[str, Any]:
        return {**vars(self), "_client": {}, "_pid": None}

    backend.__init__ = init
    backend.get = get
    backend.__getstate__ = getstate


@_patch(
    "pairs of folders",
    "basicsr/data/data_util.py",
    "An LR image with another suffix than its HR image has no partner; a stray file counts as an image.",
    lambda: not _is_ours(_host("data.data_util").paired_paths_from_folder),
)
def _patch_pairing() -> None:
    from esc_basicsr.data.image_pairs import pair_folders, stray_names

    def paired_paths_from_folder(
        folders: Sequence[str], keys: Sequence[str], filename_tmpl: str
    ) -> list[dict[str, str]]:
        (lq, gt), (lq_key, gt_key) = map(Path, folders), keys
        for folder in (lq, gt):
            if strays := stray_names(folder):
                logger.warning("%s: no images, and left out: %s", folder, ", ".join(strays))
        pairs = pair_folders(gt, lq, filename_tmpl)
        return [{f"{lq_key}_path": str(lq / pairs[name]), f"{gt_key}_path": str(gt / name)} for name in pairs]

    for module in ("data_util", "paired_image_dataset", "realesrgan_paired_dataset"):
        _host(f"data.{module}").paired_paths_from_folder = paired_paths_from_folder
