"""The way into BasicSR's own train_pipeline and test_pipeline: command line, options, processes."""

import argparse
import contextlib
import importlib
import itertools
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from esc_basicsr.basicsr_host import patches as compat
from esc_basicsr.common import signals as stopping
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.common.version import __version__
from esc_basicsr.options.check import check_options
from esc_basicsr.options.kinds import FOLDER_NAME
from esc_basicsr.options.loader import load_options
from esc_basicsr.training import heartbeat

ParseOptions = Callable[..., tuple[dict[str, Any], argparse.Namespace]]


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


def run(args: argparse.Namespace, is_train: bool) -> int:
    """Run BasicSR's pipeline; experiments, results and tb_logger go under the working directory."""
    name = "train" if is_train else "test"
    argv = [f"esc_basicsr.{name}", "-opt", args.opt, "--launcher", args.launcher]
    argv += ["--auto_resume"] * args.auto_resume + ["--debug"] * args.debug
    argv += ["--force_yml", *args.force_yml] if args.force_yml else []
    module = importlib.import_module(f"basicsr.{name}")
    stock_info = module.get_env_info

    def get_env_info() -> str:
        # BasicSR asks for it as soon as its log file is there.
        mends = ", ".join(mend.name for mend in compat.active_mends())
        logger.info("esc_basicsr %s mends of this BasicSR: %s", __version__, mends or "nothing")
        return stock_info()

    # BasicSR takes its flags from sys.argv alone, and writes them into the experiment's copy of the options.
    signals = stopping.watched_for() if is_train else contextlib.nullcontext()
    with (
        signals,
        heartbeat.watched(),
        _replaced(sys, "argv", argv),
        _replaced(module, "get_env_info", get_env_info),
    ):
        try:
            getattr(module, f"{name}_pipeline")(str(Path.cwd()))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{args.opt}: out of memory. Lower datasets.train.batch_size_per_gpu or gt_size, "
                f"val.batch_size, or the sizes of network_g. ({str(error).partition(chr(10))[0]})"
            ) from error
    return 0


def parse_options(
    stock: ParseOptions, root_path: str, is_train: bool = True
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Have ``stock``, BasicSR's parse_options, see options that were read safely and checked.

    It stays in charge of seeds and paths. A mistake in the options, on any rank, is told once and ends all
    ranks with exit code 2.

    Returns:
        As BasicSR's: the options, and the command line.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, is_train)
    args, unknown = parser.parse_known_args()
    checked = _agree_on_options(args, Path(root_path), is_train)
    compat.mend_copied_script(sys.modules["__main__"])
    module = sys.modules[stock.__module__]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "options.yml"
        file.write_text(_as_yaml(checked), encoding="utf-8")
        argv = [sys.argv[0], "-opt", str(file), "--launcher", args.launcher, *unknown]
        argv += ["--auto_resume"] * args.auto_resume + ["--debug"] * args.debug
        # The processes have met already, to agree on the options.
        with _replaced(sys, "argv", argv), _replaced(module, "init_dist", lambda *args, **kwargs: None):
            opt, _ = stock(root_path, is_train=is_train)
    return opt, args


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
            and any(Path(root, "experiments", name, "training_states").glob("*.state"))
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
            told_by: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(told_by, (problem and _from_here(problem), _as_yaml(options)))
            problems = [problem for problem, _ in told_by]
            problems.append(_difference([text for _, text in told_by]))
    told = next(filter(None, problems), None)
    if told is None:
        return options
    joined = dist.is_initialized()
    if not joined or dist.get_rank() == 0:
        print(f"error: {told}", file=sys.stderr, flush=True)
    if joined:
        dist.barrier()  # torchrun ends every process as soon as one has ended: not before it is told
        dist.destroy_process_group()
    sys.exit(2)


def _join(launcher: str, options: dict[str, Any]) -> None:
    """Meet the other processes, through BasicSR's own function."""
    params = dict(options.get("dist_params") or {})
    if options.get("num_gpu") == 0:
        params["backend"] = "gloo"
    limit = params.pop("timeout", heartbeat.DEFAULT_LIMIT)
    importlib.import_module("basicsr.utils.dist_util").init_dist(launcher, **params)
    heartbeat.start(limit)


def _difference(texts: Sequence[str]) -> str | None:
    """How the options of ranks differ, who would then wait for one another for ever; None if they do not."""
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


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """``owner.name`` is ``value`` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
