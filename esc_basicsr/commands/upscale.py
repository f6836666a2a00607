"""Upscale images: files, folders (searched in depth) and patterns such as 'holiday/*.jpg'; and films.

PNG, JPEG, WebP and TIFF, 8 and 16 bit, gray or colour, with transparency, colour profile and metadata, which
are kept; AVIF, HEIC and JPEG XL are read. OUT is a folder, which receives NAME_x4.png for NAME.png; or, for
one image, a file.

Films are upscaled where they are named: audio, subtitles, chapters, timestamps and colours are kept. Whoever
stops one, or loses power, calls again and it goes on. Needs the extra esc-basicsr[video].

  python -m esc_basicsr upscale photo.jpg -o photo_x4.jpg --model ESC_x4.pth
  python -m esc_basicsr upscale holiday -o large --model ESC-light_x2.safetensors --format png
  python -m esc_basicsr upscale film.mp4 -o film_x2.mkv --start 1:30 --end 1:40
"""

import argparse
import glob
import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import check_writable
from esc_basicsr.common.first_few import first_few
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.data.image_folder import UNREAD_SUFFIXES, VIDEO_SUFFIXES, find_images
from esc_basicsr.fast.precision import PRECISIONS
from esc_basicsr.upscale.image import upscale_file
from esc_basicsr.upscale.image_file import DEFAULT_CRF, FORMATS, VIDEO_FORMATS
from esc_basicsr.upscale.output_size import OutputSize, read_box, read_factor
from esc_basicsr.upscale.read_image import MOST_PIXELS, READ_SUFFIXES
from esc_basicsr.upscale.upscaler import Upscaler
from esc_basicsr.weights.shipped import model_list
from esc_basicsr.weights.shown import shown

_SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
_NAME = 40  # characters of a file's name beside the bar

Argument = TypeVar("Argument")


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
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--outscale",
        type=_argument(read_factor),
        metavar="N",
        help="times as large, such as 3.5: upscaled by the network, then reduced",
    )
    size.add_argument(
        "--size",
        type=_argument(read_box),
        metavar="WxH",
        help="as large as fits, such as 3840x2160: upscaled by the network, then reduced, in proportion",
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="self-ensemble: average eight flips and turns: better, eight times as long",
    )
    parser.add_argument(
        "--format", choices=[*_SUFFIXES], help="of the files that are written (default: each one's own)"
    )
    parser.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="of JPEG and WebP, 1 to 100 (default: 95)"
    )
    parser.add_argument(
        "--crf",
        type=int,
        default=DEFAULT_CRF,
        metavar="N",
        help="of films: 0 best, 51 smallest (default: %(default)s)",
    )
    parser.add_argument(
        "--start", type=_seconds, metavar="TIME", help="of films: seconds, or such as 1:02:03.5"
    )
    parser.add_argument("--end", type=_seconds, metavar="TIME", help="of films")
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
    has_films = any(map(_is_film, images))
    _check_film_arguments(args, has_films)
    size = _output_size(args)
    memory = None if args.memory is None else int(args.memory * 2**30)
    upscaler = Upscaler(
        args.model,
        args.scale if args.model or args.scale else _shipped_scale(size),
        device=args.device,
        precision=args.precision,
        memory=memory,
        ensemble=args.ensemble,
    )
    if size.outscale is not None and size.outscale > upscaler.scale:
        raise UserError(f"--outscale {float(size.outscale):g} is more than the network's ×{upscaler.scale}.")
    targets = _name_targets(images, args.output, str(size) or f"x{upscaler.scale}", args.format)
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
                if _is_film(source):
                    from esc_basicsr.upscale.video import upscale_video  # which needs an extra

                    upscale_video(upscaler, source, target, size, args.crf, args.start, args.end)
                else:
                    most = int(args.max_megapixels * 10**6)
                    upscale_file(upscaler, source, target, args.quality, most, size)
            except UserError as error:
                problems.append(_printable(str(error)))
            except Exception as error:  # of one image; the others are still to be done
                reason = "not enough memory" if is_out_of_memory(error) else repr(error)
                problems.append(_printable(f"{source}: {reason}"))
    done = len(targets) - len(problems)
    skipped = f"; {len(existing)} existed already" if args.skip_existing else ""
    word = "files" if has_films else "images"
    print(f"{shown(args.output)}: {done} of {len(targets)} {word} upscaled{skipped}.")
    if half := upscaler.chosen_half:
        print(f"8-bit {word} were computed in {half}, which a trial found to agree with fp32.")
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} could not be upscaled:", *problems]))
    return 0


def _is_film(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _check_film_arguments(args: argparse.Namespace, has_films: bool) -> None:
    """Refuse times that are none; see that PyAV is installed before anything is upscaled."""
    if has_films:
        import av  # noqa: F401
    elif args.start is not None or args.end is not None:
        raise UserError("--start and --end are for films, and none is named.")
    if not 0 <= args.crf <= 51:
        raise UserError(f"--crf must be from 0 to 51, got {args.crf}.")
    if args.end is not None and args.end <= (args.start or 0):
        raise UserError("--end must be later than --start.")


def _seconds(text: str) -> Fraction:
    found = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected seconds, or such as 1:02:03.5, got {text!r}")
    hours, minutes, seconds = (Fraction(part or 0) for part in found.groups())
    return (hours * 60 + minutes) * 60 + seconds


def _argument(read: Callable[[str], Argument]) -> Callable[[str], Argument]:
    """Have argparse name the argument that a text was given for."""

    def read_argument(text: str) -> Argument:
        try:
            return read(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_argument


def _output_size(args: argparse.Namespace) -> OutputSize:
    if args.outscale is not None and args.outscale < 1:
        raise UserError(f"--outscale must be at least 1, got {float(args.outscale):g}.")
    return OutputSize(args.outscale, args.size)


def _shipped_scale(size: OutputSize) -> int | None:
    """Choose the scale of the network that ships: the least that is enough, or for a box the largest."""
    scales = sorted({listed.scale for listed in model_list().values()})
    if size.outscale is not None:
        return next((scale for scale in scales if scale >= size.outscale), scales[-1] if scales else None)
    return scales[-1] if size.box is not None and scales else None


def _find(inputs: Sequence[str]) -> dict[Path, Path]:
    """Find the images, and the path of each below the output folder, as it is below the input's."""
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found |= {path / relative: relative for relative in find_images(path, True, READ_SUFFIXES)}
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


def _name_targets(images: dict[Path, Path], output: Path, size: str, kind: str | None) -> dict[Path, Path]:
    """Name the file that each image becomes; what was upscaled before is not an input."""
    suffix = output.suffix.lower()
    if len(images) == 1 and not output.is_dir():
        formats = VIDEO_FORMATS if any(map(_is_film, images)) else FORMATS
        if kind is not None and FORMATS[_SUFFIXES[kind]] != formats.get(suffix, FORMATS[_SUFFIXES[kind]]):
            raise UserError(f"--format {kind} contradicts the name {output}: leave one out.")
        if suffix in formats:
            return dict.fromkeys(images, output)
        if suffix in (".bmp", *FORMATS, *UNREAD_SUFFIXES):
            raise UserError(f"{output}: {suffix} is not written; choose among {', '.join(formats)}.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; for {len(images)} images a folder is expected.")
    targets: dict[Path, Path] = {}
    sources: dict[Path, Path] = {}
    for source, relative in images.items():
        own = source.suffix.lower()
        if _is_film(source):
            own = own if own in VIDEO_FORMATS else ".mkv"
        elif kind is not None:
            own = _SUFFIXES[kind]
        elif own not in FORMATS:
            own = ".png"
        target = output / relative.with_name(f"{relative.stem}_{size}{own}")
        if target in sources:
            raise UserError(f"{sources[target]} and {source} would both become {target}: rename one.")
        sources[target], targets[source] = source, target
    # Where OUT is a folder of INPUT, or below one, what was upscaled before lies among the images.
    made = {target.resolve() for target in sources}
    return {source: target for source, target in targets.items() if source.resolve() not in made}


def _printable(text: str) -> str:
    """Write out what steers a terminal or cannot be printed."""
    return text if text.isprintable() else ascii(text)[1:-1]
