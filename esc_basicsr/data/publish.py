"""Output folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esc_basicsr.errors import UserError

__all__ = ["publishing"]


@contextmanager
def publishing(targets: Sequence[Path], contents: Sequence[str], overwrite: bool) -> Iterator[list[Path]]:
    """Lend an empty ``<target>.partial`` for each target; rename all of them at the end.

    On an exception, Ctrl-C included, they are removed and nothing appears under the final names. What a
    killed process left under a ``.partial`` name is replaced by the next run.

    Args:
        targets: The final folders.
        contents: Patterns of the files that such a folder holds. A folder that holds anything else was not
            made by us, and is never replaced.
        overwrite: Replace existing targets, once the new ones are complete.

    Raises:
        UserError: A target exists and ``overwrite`` is false, or it holds something else, or writing fails.
    """
    targets = [target.resolve() for target in targets]
    for target in targets:
        _check_replaceable(target, contents, overwrite)
    partials = [target.with_name(target.name + ".partial") for target in targets]
    try:
        for partial in partials:
            _remove(partial)
            partial.mkdir(parents=True)
        yield partials
        replaced = [
            (target, target.with_name(target.name + ".replaced")) for target in targets if target.exists()
        ]
        for target, aside in replaced:
            _remove(aside)
            target.rename(aside)
        for partial, target in zip(partials, targets, strict=True):
            partial.rename(target)
        for _, aside in replaced:
            _remove(aside)
    except BaseException as error:
        for partial in partials:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{targets[0]} cannot be written: {error}") from error
        raise


def _check_replaceable(target: Path, contents: Sequence[str], overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} exists already: choose another name, or pass --overwrite to replace it")
    if not target.is_dir():
        raise UserError(f"{target} is a file, where a folder is to be: move it away or choose another name")
    for path in target.iterdir():
        if not any(path.match(pattern) for pattern in contents):
            raise UserError(
                f"{target} is not replaced, as it holds {path.name} and not only {', '.join(contents)}: "
                "move it away or choose another name"
            )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
