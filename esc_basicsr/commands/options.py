"""Write the shipped option files, list them, or check files of your own before training by them.

For example:
  python -m esc_basicsr options --list
  python -m esc_basicsr options --write options
  python -m esc_basicsr options --check options/train/ESC/ESC_x2_DIV2K.yml
"""

import argparse
import os
from pathlib import Path

from esc_basicsr.common.errors import UserError
from esc_basicsr.options.loader import load_options
from esc_basicsr.options.recipes import option_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="name the shipped option files")
    action.add_argument("--write", metavar="DIR", type=Path, help="write the shipped option files below DIR")
    action.add_argument(
        "--check",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="say what is wrong in option files, with remedies",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --write: replace files that differ from the shipped ones",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; 0 when all is well."""
    if args.overwrite and args.write is None:
        raise UserError("--overwrite goes with --write DIR")
    if args.write is not None:
        write(args.write, args.overwrite)
    elif args.check:
        check(args.check)
    else:
        print("\n".join(str(path) for path in option_files()))
    return 0


def write(folder: Path, overwrite: bool) -> None:
    """Write every shipped option file below ``folder``.

    Raises:
        UserError: Files there differ and ``overwrite`` is false (then none is written), or cannot be written.
    """
    try:
        changed = {
            folder / path: text for path, text in option_files().items() if _differs(folder / path, text)
        }
        kept = [str(path) for path in changed if path.exists()]
        if kept and not overwrite:
            raise UserError(
                "\n  ".join(
                    ["these files differ from the shipped ones; rename yours or add --overwrite:", *kept]
                )
            )
        for path, text in changed.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                unfinished.write_text(text, encoding="utf-8", newline="\n")
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write option files below {folder}: {error}") from None
    print(f"{len(changed)} option files written to {folder}, {len(option_files()) - len(changed)} up to date")


def check(files: list[Path]) -> None:
    """Load and check option files; those with a ``train`` section as files to train by.

    Raises:
        UserError: What is wrong in them all.
    """
    from esc_basicsr.options.check import check_options  # needs BasicSR, which writing files does not

    wrong = []
    for file in files:
        try:
            options = load_options(file)
            is_train = "train" in options
            check_options(options, file, is_train)
            print(f"{file}: sound, to {'train' if is_train else 'test'} by")
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_bytes() != text.encode()
