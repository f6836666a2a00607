"""Output folders that appear whole or not at all."""

import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from esc_basicsr.common import signals
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger

__all__ = ["check_replaceable", "partial_of", "publishing", "put_in_place", "remove", "sigterm_raises"]


@contextmanager
def publishing(targets: Sequence[Path], contents: Sequence[str], overwrite: bool) -> Iterator[list[Path]]:
    """Lend an empty ``<target>.partial`` for each target; rename all of them at the end.

    On an exception, Ctrl-C and SIGTERM included, they are removed, and what was under the final names is
    there as before. What a killed process left under a ``.partial`` name is replaced by the next run.

    Args:
        targets: The final folders.
        contents: Patterns of the files that such a folder holds. A folder that holds anything else was not
            made by us, and is never replaced.
        overwrite: Replace existing targets, once the new ones are complete.

    Raises:
        UserError: A target exists and ``overwrite`` is false, or it holds something else, or writing fails.
    """
    targets = [target.resolve() for target in targets]
    check_replaceable(targets, contents, overwrite)
    partials = [partial_of(target) for target in targets]
    with sigterm_raises():
        try:
            for partial in partials:
                remove(partial)
                partial.mkdir(parents=True)
            yield partials
            put_in_place(targets)
        except BaseException as error:
            for partial in partials:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"{targets[0]} cannot be written: {error}") from error
            raise


def partial_of(target: Path) -> Path:
    """Return where a folder is written until it becomes ``target``."""
    return target.with_name(target.name + ".partial")


def _aside_of(target: Path) -> Path:
    return target.with_name(target.name + ".replaced")


def put_in_place(targets: Sequence[Path]) -> None:
    """Rename ``<target>.partial`` to each target, replacing what is there.

    Targets without such a folder are passed over: when a process was killed in here, calling it once more
    completes what it began.

    Raises:
        OSError: Renaming failed; then all is named as before.
    """
    waiting = [target for target in targets if partial_of(target).exists()]
    _rename([partial_of(target) for target in waiting], waiting, [_aside_of(target) for target in waiting])
    for target in targets:
        try:
            remove(_aside_of(target))
        except OSError as error:
            logger.warning("%s is complete; what it replaced cannot be removed: %s", target, error)


def _rename(partials: Sequence[Path], targets: Sequence[Path], asides: Sequence[Path]) -> None:
    """Rename all, the targets that exist to their asides first; on failure all is named as before."""
    for aside in asides:
        remove(aside)
    were_there = [target.exists() for target in targets]
    try:
        for target, aside in zip(targets, asides, strict=True):
            if target.exists():
                target.rename(aside)
        for partial, target in zip(partials, targets, strict=True):
            partial.rename(target)
    except BaseException:
        for partial, target, aside, was_there in zip(partials, targets, asides, were_there, strict=True):
            is_aside = aside.exists()
            if not partial.exists() and (is_aside or not was_there):
                target.rename(partial)
            if is_aside:
                aside.rename(target)
        raise


def sigterm_raises() -> AbstractContextManager[None]:
    """Make SIGTERM raise SystemExit, so that cleaning up runs, where no other handler is at work."""
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return signals.watched_for() if is_free else nullcontext()


def check_replaceable(targets: Sequence[Path], contents: Sequence[str], overwrite: bool) -> None:
    """Refuse targets that exist and must not be replaced, as `publishing` says.

    Raises:
        UserError: There is one.
    """
    for target in filter(Path.exists, targets):
        if not overwrite:
            raise UserError(
                f"{target} exists already: choose another name, or pass --overwrite to replace it"
            )
        if not target.is_dir():
            raise UserError(f"{target} is a file, not a folder: move it away or choose another name")
        for path in target.iterdir():
            if not any(path.match(pattern) for pattern in contents):
                raise UserError(
                    f"{target} is not replaced, as it holds {path.name} and not only {', '.join(contents)}: "
                    "move it away or choose another name"
                )


def remove(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
