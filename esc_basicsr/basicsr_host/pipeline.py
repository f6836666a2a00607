"""The way into BasicSR's own train_pipeline and test_pipeline."""

import argparse
import contextlib
import errno
import importlib
import os
import signal
from pathlib import Path
from unittest import mock

from esc_basicsr.basicsr_host import parse, patches
from esc_basicsr.basicsr_host.copies import warn_of_shadowing
from esc_basicsr.common import signals
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger, report_log_errors_once
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.common.version import __version__
from esc_basicsr.training import experiment_lock, heartbeat

# full, over a quota or a limit, read-only, forbidden, no folder
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR}


def run(args: argparse.Namespace, is_train: bool) -> int:
    """Run BasicSR's pipeline; experiments, results and tb_logger go under the working directory."""
    name = "train" if is_train else "test"
    module = importlib.import_module(f"basicsr.{name}")
    stock_info = module.get_env_info

    def get_env_info() -> str:
        # BasicSR asks for it as soon as its log file is there.
        names = ", ".join(patch.name for patch in patches.active())
        logger.info("esc_basicsr %s patches of this BasicSR: %s", __version__, names or "none")
        warn_of_shadowing()
        return stock_info()

    report_log_errors_once()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # an agent that is killed ends none of its ranks
        signals.sent_with_parent(signal.SIGTERM)
    watched = signals.watched_for() if is_train else contextlib.nullcontext()
    token = parse.given.set(args)
    with watched, heartbeat.watched(), mock.patch.object(module, "get_env_info", get_env_info):
        try:
            getattr(module, f"{name}_pipeline")(str(Path.cwd()))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            train = "datasets.train.batch_size_per_gpu or gt_size, " if is_train else ""
            raise UserError(
                f"{args.opt}: out of memory. Lower {train}val.batch_size, or the sizes of network_g. "
                f"({str(error).partition(chr(10))[0]})"
            ) from error
        except OSError as error:
            if error.errno not in _OF_DISKS:
                raise
            raise UserError(f"{error.filename or Path.cwd()} cannot be written: {error.strerror}.") from error
        finally:
            parse.given.reset(token)
            experiment_lock.release()
    return 0
