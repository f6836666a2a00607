"""Write the shipped option files, list them, describe every key, or check files of your own.

For example:
  python -m esc_basicsr options --list
  python -m esc_basicsr options --write options
  python -m esc_basicsr options --docs docs/options.md
  python -m esc_basicsr options --check options/train/ESC/ESC_x2_DIV2K.yml
"""

import argparse
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import make_folder_of, written_whole
from esc_basicsr.options.loader import load_options
from esc_basicsr.options.recipes import option_files
from esc_basicsr.options.reference import json_schema, reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments to ``parser``."""
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="name the shipped option files")
    action.add_argument("--write", metavar="DIR", type=Path, help="write the shipped option files below DIR")
    action.add_argument("--docs", metavar="FILE", type=Path, help="write a page that describes every key")
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
        help="with --write or --docs: replace files that differ from the shipped ones",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; 0 when all is well."""
    if args.overwrite and args.write is None and args.docs is None:
        raise UserError("--overwrite goes with --write DIR or --docs FILE")
    if args.write is not None:
        files = {**option_files(), PurePosixPath("schema.json"): json_schema()}
        written = write({args.write / path: text for path, text in files.items()}, args.overwrite)
        print(f"{written} files written to {args.write}, {len(files) - written} up to date")
    elif args.docs is not None:
        written = write({args.docs: reference()}, args.overwrite)
        print(f"{args.docs}: {'written' if written else 'up to date'}")
    elif args.check:
        check(args.check)
    else:
        print("\n".join(str(path) for path in option_files()))
    return 0


def write(files: Mapping[Path, str], overwrite: bool) -> int:
    """Write those files that differ from their text, and return how many.

    Raises:
        UserError: Files there differ and ``overwrite`` is false (then none is written), or cannot be written.
    """
    changed = {path: text for path, text in files.items() if _differs(path, text)}
    kept = [str(path) for path in changed if path.exists()]
    if kept and not overwrite:
        problem = "these files differ from the shipped ones; rename yours or add --overwrite:"
        raise UserError("\n  ".join([problem, *kept]))
    for path, text in changed.items():
        make_folder_of(path)
        with written_whole(path) as file:
            file.write(text.encode())
    return len(changed)


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
    return not path.is_file() or path.read_bytes() != text.encode()
