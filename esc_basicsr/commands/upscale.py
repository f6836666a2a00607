"""Upscale images: files, folders (searched in depth) and patterns such as 'holiday/*.jpg'.

PNG, JPEG, WebP and TIFF, 8 and 16 bit, gray or colour, with transparency, colour profile and metadata, which
are kept. OUT is a folder, which receives NAME_x4.png for NAME.png; or, for one image, a file.

  python -m esc_basicsr upscale photo.jpg -o photo_x4.jpg --model ESC_x4.pth
  python -m esc_basicsr upscale holiday -o large --model ESC-light_x2.safetensors --format png
"""

import argparse
import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import check_replaceable, check_writable
from esc_basicsr.common.first_few import first_few
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.data.image_folder import UNREAD_SUFFIXES, find_images
from esc_basicsr.upscale.image_file import FORMATS
from esc_basicsr.upscale.read_image import MOST_PIXELS, read_image
from esc_basicsr.upscale.upscaler import PRECISIONS, Upscaler
from esc_basicsr.upscale.write_image import fitted, write_image
from esc_basicsr.weights.shipped import model_list
from esc_basicsr.weights.shown import shown

_SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
_NAME = 40  # characters of a file's name beside the bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = ", ".join(model_list())
    parser.add_argument("input", nargs="+", metavar="INPUT", help="image, folder, or pattern")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder, or file for one image"
    )
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="checkpoint (.pth, .safetensors), whose network and scale are read from it, or a name "
        f"({names}; default: the first of the scale)",
    )
    parser.add_argument("--scale", type=int, choices=[2, 3, 4], help="times as large (default: the model's)")
    parser.add_argument(
        "--format", choices=[*_SUFFIXES], help="of the files that are written (default: each one's own)"
    )
    parser.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="of JPEG and WebP, 1 to 100 (default: 95)"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace files that exist")
    existing.add_argument("--skip-existing", action="store_true", help="skip what was upscaled before")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="auto: fp16 on a GPU, bf16 on a CPU that multiplies it, where it gives the same; else fp32 "
        "(default: auto)",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="to work in (default: most of what is available)"
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=MOST_PIXELS / 10**6,
        metavar="N",
        help="refuse larger inputs, whose few bytes may unpack to more than the memory (default: 1000)",
    )


def run(args: argparse.Namespace) -> int:
    """Upscale all images."""
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality must be from 1 to 100, got {args.quality}.")
    if args.memory is not None and not 0 < args.memory < float("inf"):
        raise UserError(f"--memory must be above 0 GiB, got {args.memory}.")
    if not 0 < args.max_megapixels < float("inf"):
        raise UserError(f"--max-megapixels must be above 0, got {args.max_megapixels}.")
    images = _find(args.input)
    memory = None if args.memory is None else int(args.memory * 2**30)
    upscaler = Upscaler(args.model, args.scale, device=args.device, precision=args.precision, memory=memory)
    targets = _name_targets(images, args.output, upscaler.scale, args.format)
    existing = [path for path in targets.values() if os.path.lexists(path)]
    known = {*existing}
    if args.skip_existing:
        targets = {source: path for source, path in targets.items() if path not in known}
    elif existing and not args.overwrite:
        listed = first_few([*map(shown, existing)])
        raise UserError(
            f"{len(existing)} of {len(targets)} files exist already: {listed}. Add --overwrite to "
            "replace them, --skip-existing to leave them as they are, or name another folder."
        )
    for folder in {target.parent for target in targets.values()}:
        check_writable(folder)
    problems = []
    title = f"×{upscaler.scale} by {shown(Path(upscaler.name).name)}"
    with logging_redirect_tqdm(), tqdm(targets.items(), desc=title, unit="image") as bar:
        for source, target in bar:
            bar.set_postfix_str(_printable(source.name)[:_NAME])
            try:
                upscale_file(upscaler, source, target, args.quality, int(args.max_megapixels * 10**6))
            except UserError as error:
                problems.append(_printable(str(error)))
            except Exception as error:  # of one image; the others are still to be done
                reason = "not enough memory" if is_out_of_memory(error) else repr(error)
                problems.append(_printable(f"{source}: {reason}"))
    done = len(targets) - len(problems)
    skipped = f"; {len(existing)} existed already" if args.skip_existing else ""
    print(f"{shown(args.output)}: {done} of {len(targets)} images upscaled{skipped}.")
    if half := upscaler.chosen_half:
        print(f"8-bit images were computed in {half}: faster than fp32, and the same in a trial.")
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} could not be upscaled:", *problems]))
    return 0


def upscale_file(
    upscaler: Upscaler, source: Path, target: Path, quality: int = 95, most_pixels: int = MOST_PIXELS
) -> None:
    """Upscale one image file, with what belongs to it.

    Raises:
        UserError: ``source`` cannot be read, or ``target`` not be written or not hold the image.
    """
    check_replaceable(target)
    image = fitted(target, read_image(source, most_pixels), upscaler.scale)
    pixels = upscaler(image.visible_colours())
    alpha = image.alpha
    if alpha is not None:
        # a constant one stays what it is; the network would come close
        is_constant = bool((alpha == alpha.flat[0]).all())
        size = tuple(side * upscaler.scale for side in alpha.shape)
        alpha = np.full(size, alpha.flat[0], alpha.dtype) if is_constant else upscaler(alpha)
    write_image(target, replace(image, pixels=pixels, alpha=alpha), quality)


def _find(inputs: Sequence[str]) -> dict[Path, Path]:
    """Find the images, and the path of each below the output folder, as it is below the input's."""
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found |= {path / relative: relative for relative in find_images(path, recursive=True)}
        elif path.is_file():
            found[path] = Path(path.name)
        elif not path.exists() and glob.has_magic(text):
            # for shells that leave patterns to the program
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207 - absolute ones too
            images = [match for match in matches if match.is_file()]
            if not images:
                raise UserError(f"{text}: no file matches this pattern.")
            found |= {match: Path(match.name) for match in images}
        elif path.exists():
            raise UserError(f"{text} is neither a file nor a folder.")
        else:
            raise UserError(f"{text}: no such image or folder (working directory: {Path.cwd()}).")
    return found


def _name_targets(images: dict[Path, Path], output: Path, scale: int, kind: str | None) -> dict[Path, Path]:
    """Name the file that each image becomes; what was upscaled before is not an input."""
    suffix = output.suffix.lower()
    if len(images) == 1 and suffix in FORMATS and not output.is_dir():
        if kind is not None and FORMATS[_SUFFIXES[kind]] != FORMATS[suffix]:
            raise UserError(f"--format {kind} contradicts the name {output}: leave one out.")
        return dict.fromkeys(images, output)
    if len(images) == 1 and suffix in (".bmp", *UNREAD_SUFFIXES) and not output.is_dir():
        raise UserError(f"{output}: {suffix} is not written; choose among {', '.join(FORMATS)}.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; for {len(images)} images a folder is expected.")
    targets: dict[Path, Path] = {}
    sources: dict[Path, Path] = {}
    for source, relative in images.items():
        own = source.suffix.lower() if source.suffix.lower() in FORMATS else ".png"
        target = output / relative.with_name(f"{relative.stem}_x{scale}{_SUFFIXES[kind] if kind else own}")
        if target in sources:
            raise UserError(f"{sources[target]} and {source} would both become {target}: rename one.")
        sources[target], targets[source] = source, target
    # Where OUT is a folder of INPUT, or below one, what was upscaled before lies among the images.
    made = {target.resolve() for target in sources}
    return {source: target for source, target in targets.items() if source.resolve() not in made}


def _printable(text: str) -> str:
    """Write out what steers a terminal or cannot be printed."""
    return text if text.isprintable() else ascii(text)[1:-1]
