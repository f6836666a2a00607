"""Make LMDB training sets from folders of images (PNG, JPEG, WebP, BMP, TIFF), or verify sets.

HR images are cropped to a multiple of the scales, reduced bicubically as MATLAB does, and cut into
overlapping sub-images, which load faster than whole images. The sets are in BasicSR's form:

  OUTPUT/NAME_HR_sub.lmdb               HR
  OUTPUT/NAME_LR_bicubic_X4_sub.lmdb    LR, for each scale

DIV2K with pairs for every scale:
  python -m esc_basicsr lmdb DIV2K_train_HR -o datasets/DIV2K --name DIV2K_train --scales 2 3 4

HR alone, for DFLIPDataset:
  python -m esc_basicsr lmdb Flickr2K_HR -o datasets/Flickr2K --name Flickr2K

However it was interrupted, the same command goes on where it was. Sets are verified before they appear;
later, as after copying them:
  python -m esc_basicsr lmdb --verify datasets/Flickr2K/Flickr2K_HR_sub.lmdb

Images that are damaged, or unfit otherwise, are skipped and listed in OUTPUT/NAME_HR_sub.skipped.csv.
Exit code: 0 when all is done; 3 when sets were made, but images were skipped; 2 for a mistake, such as a
damaged set; 130 when interrupted.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.image_keys import find_keyed_images
from esc_basicsr.data.building.lmdb_verification import verify_lmdb
from esc_basicsr.data.building.lmdb_writer import COMPRESSION, build_lmdb_sets
from esc_basicsr.data.building.skipped import report_of

_IMAGES_SKIPPED = 3  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "input",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help="folder of HR images, searched in depth; with --verify, a set",
    )
    parser.add_argument("-o", "--output", type=Path, help="folder that receives the sets")
    parser.add_argument("--name", help="prefix of the sets' names, as DIV2K_train")
    parser.add_argument(
        "--scales",
        nargs="*",
        type=int,
        default=[],
        metavar="S",
        help="LR sets to write (default: none, HR alone)",
    )
    parser.add_argument(
        "--crop-size",
        type=int,
        default=480,
        metavar="PX",
        help="side of HR sub-images; 0: whole images (default: 480)",
    )
    parser.add_argument(
        "--step", type=int, default=240, metavar="PX", help="distance of HR sub-images (default: 240)"
    )
    parser.add_argument(
        "--compression",
        type=int,
        default=COMPRESSION,
        metavar="LEVEL",
        help="of the records: 0, stored as they are and fastest to load, to 9, smallest; 1 takes some 45%% "
        f"less space than 0 (default: {COMPRESSION})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per CPU)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing sets of these names")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="throw away what an interrupted build of these sets left, and begin anew",
    )
    parser.add_argument(
        "--verify", action="store_true", help="make nothing: look at every record of the sets INPUT"
    )


def run(args: argparse.Namespace) -> int:
    """Make the sets and print where they are; or verify sets."""
    if args.verify:
        return _verify(args.input)
    if args.output is None or args.name is None:
        raise UserError("to make sets, give their folder and their name: -o OUTPUT --name NAME")
    if Path(args.name).name != args.name or args.name.startswith("."):
        raise UserError(f"--name is the beginning of folder names, not a path, got {args.name!r}")
    images, skipped = find_keyed_images(args.input)
    sets = build_lmdb_sets(
        images,
        args.output,
        args.name,
        scales=args.scales,
        crop_size=args.crop_size,
        step=args.step,
        compression=args.compression,
        workers=args.workers,
        overwrite=args.overwrite,
        restart=args.restart,
        skipped=skipped,
    )
    for folder in sets.values():
        print(folder)
    return _IMAGES_SKIPPED if report_of(sets[1]).exists() else 0


def _verify(sets: Sequence[Path]) -> int:
    """Verify all, and report at the end what is wrong with any."""
    faults = []
    for folder in sets:
        try:
            print(f"{folder}: {verify_lmdb(folder)} records are as they should be")
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return 0
