"""The command line and the option file of BasicSR's pipelines: read once, checked, agreed on by all ranks."""

import argparse
import importlib
import itertools
import os
import random
import socket
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from esc_basicsr.common.errors import UserError
from esc_basicsr.options.check import check_options
from esc_basicsr.options.kinds import FOLDER_NAME
from esc_basicsr.options.loader import load_options
from esc_basicsr.options.schema import filled
from esc_basicsr.training import experiment_lock, heartbeat, meeting
from esc_basicsr.training.ranks import on_first_rank

# The command line, where a command of this package has parsed it; a copy of BasicSR's train.py has not.
given: ContextVar[argparse.Namespace | None] = ContextVar("given", default=None)

_DEBUG_FREQUENCY = 8  # iterations; of validation and saving under --debug, as in BasicSR


def add_arguments(parser: argparse.ArgumentParser, is_train: bool) -> None:
    """Declare BasicSR's flags."""
    parser.add_argument("-opt", required=True, metavar="FILE", help="option file")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="what started the processes: nothing, torchrun, or srun (default: none)",
    )
    if is_train:
        parser.add_argument(
            "--auto_resume", action="store_true", help="go on from the experiment's newest state"
        )
    else:
        parser.set_defaults(auto_resume=False)
    parser.add_argument(
        "--debug", action="store_true", help="print and validate often, under the name debug_NAME"
    )
    parser.add_argument(
        "--force_yml",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="set options of the file, such as train:ema_decay=0.999",
    )
    # torch.distributed.launch gives it, with a dash since torch 2.0; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def parse_options(root_path: str, is_train: bool = True) -> tuple[dict[str, Any], argparse.Namespace]:
    """Read and check the options, in BasicSR's parse_options' place.

    A mistake in the options, on any rank, is reported once and ends all ranks with exit code 2.

    Returns:
        As BasicSR's: the options, completed by their defaults and by what its pipelines expect of them, and
        the command line.
    """
    args = given.get()
    if args is None:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_arguments(parser, is_train)
        args = parser.parse_args()
    opt = filled(_agree_on_options(args, Path(root_path), is_train))
    _complete(opt, args, Path(root_path), is_train)
    on_first_rank(lambda: experiment_lock.hold(Path(opt["path"]["log"])))
    return opt, args


def _complete(opt: dict[str, Any], args: argparse.Namespace, root: Path, is_train: bool) -> None:
    """Add what BasicSR 1.4.2's parse_options adds: ranks, seed, debug mode, phases, paths."""
    from basicsr.utils import set_random_seed

    opt["dist"] = args.launcher != "none"
    opt["rank"] = dist.get_rank() if opt["dist"] else 0
    opt["world_size"] = dist.get_world_size() if opt["dist"] else 1
    opt["seed_is_drawn"] = opt.get("manual_seed") is None
    if opt["seed_is_drawn"]:
        opt["manual_seed"] = random.randint(1, 10000)
    set_random_seed(opt["manual_seed"] + opt["rank"])
    opt["auto_resume"], opt["is_train"] = args.auto_resume, is_train
    opt["name"] = _run_name(args, opt["name"])
    if opt["num_gpu"] == "auto":
        opt["num_gpu"] = torch.cuda.device_count()
    for phase, section in opt["datasets"].items():
        section["phase"] = phase.split("_")[0]
        if "scale" in opt:
            section["scale"] = opt["scale"]
        _expand(section, "dataroot_gt", "dataroot_lq")
    paths = opt["path"]
    _expand(paths, *(key for key in paths if "resume_state" in key or "pretrain_network" in key))
    kind = "experiments" if is_train else "results"
    folder = root / kind / opt["name"]
    paths[f"{kind}_root"] = paths["log"] = str(folder)
    paths["visualization"] = str(folder / "visualization")
    if is_train:
        paths["models"], paths["training_states"] = str(folder / "models"), str(folder / "training_states")
        if "debug" in opt["name"]:
            if opt.get("val"):
                opt["val"]["val_freq"] = _DEBUG_FREQUENCY
            opt["logger"] |= {"print_freq": 1, "save_checkpoint_freq": _DEBUG_FREQUENCY}


def _run_name(args: argparse.Namespace, name: str) -> str:
    return f"debug_{name}" if args.debug and not name.startswith("debug") else name


def _expand(section: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if section.get(key) is not None:
            section[key] = os.path.expanduser(section[key])  # noqa: PTH111 - no error for an unknown ~user


def _agree_on_options(args: argparse.Namespace, root: Path, is_train: bool) -> dict[str, Any]:
    """Read and check the options in every process; end them all, telling why once, if one cannot go on."""
    options: dict[str, Any] = {}
    problem = None
    try:
        options = load_options(args.opt, args.force_yml)
        name: Any = options.get("name")
        resumes = (
            args.auto_resume
            and FOLDER_NAME.accepts(name)
            and any((root / "experiments" / _run_name(args, name) / "training_states").glob("*.state"))
        )
        check_options(options, args.opt, is_train, resumes)
    except UserError as error:
        problem = str(error)
    launcher = args.launcher
    if launcher == "none" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
        launcher = "pytorch"
        problem = (
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but --launcher is none: each would work "
            "on its own, into one folder. Add --launcher pytorch, or start one process."
        )
    problems = [problem]
    if launcher != "none":
        try:
            _join(launcher, options)
        except UserError as error:
            problems = [problem or str(error)]
        else:
            reported: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(reported, (problem and _from_here(problem), _as_yaml(options)))
            problems = [problem for problem, _ in reported]
            problems.append(_difference([text for _, text in reported]))
    message = next(filter(None, problems), None)
    if message is None:
        return options
    joined = dist.is_initialized()
    if not joined or dist.get_rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if joined:
        dist.barrier()  # torchrun ends every process as soon as one has ended: not before it is reported
        dist.destroy_process_group()
    sys.exit(2)


def _join(launcher: str, options: dict[str, Any]) -> None:
    """Meet the other processes, through BasicSR's own function."""
    params = dict(options.get("dist_params") or {})
    if options.get("num_gpu") == 0:
        params["backend"] = "gloo"
    limit = params.pop("timeout", heartbeat.DEFAULT_LIMIT)
    with meeting.bounded(limit):
        importlib.import_module("basicsr.utils.dist_util").init_dist(launcher, **params)
        heartbeat.start(limit)


def _difference(texts: Sequence[str]) -> str | None:
    """Say in which option ranks differ, who would then wait for one another for ever; None if in none."""
    for rank, text in enumerate(texts):
        if text != texts[0]:
            pairs = itertools.zip_longest(texts[0].splitlines(), text.splitlines(), fillvalue="nothing")
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            return (
                f"the options of rank 0 and rank {rank} differ: '{one.strip()}' and '{other.strip()}'. "
                "Give all the same file and the same --force_yml."
            )
    return None


def _from_here(problem: str) -> str:
    """``problem``, saying on which rank it is where the first one may not have it."""
    rank = dist.get_rank()
    return problem if rank == 0 else f"{problem} (rank {rank}, on {socket.gethostname()})"


class _PlainDumper(yaml.SafeDumper):
    """Writes mappings in their order, and every value out in full."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_PlainDumper.add_multi_representer(dict, lambda dumper, data: dumper.represent_dict(data.items()))


def _as_yaml(options: dict[str, Any]) -> str:
    return yaml.dump(options, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
