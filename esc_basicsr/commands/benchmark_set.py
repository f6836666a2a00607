"""Lay out a test set from a folder of original HR images, as the shipped test options expect it.

OUTPUT/HR/X4/NAME.png              HR, cropped to a multiple of the scale
OUTPUT/LR_bicubic/X4/NAMEx4.png    its bicubic reduction as MATLAB makes it, 8-bit

python -m esc_basicsr benchmark-set Set5_original -o datasets/Set5 --scales 2 3 4
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.publish import publishing
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.image_codec import encode_png
from esc_basicsr.data.image_folder import check_scales, crop_to_multiple, find_images, read_image

_COMPRESSION = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "input", type=Path, metavar="INPUT", help="folder of HR images (not searched in depth)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the test set")
    parser.add_argument(
        "--scales", nargs="+", type=int, default=[2, 3, 4], metavar="S", help="scales (default: 2 3 4)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing folders of these scales")


def run(args: argparse.Namespace) -> int:
    """Lay out the test set and print where it is."""
    for folder in lay_out_benchmark(args.input, args.output, args.scales, overwrite=args.overwrite):
        print(folder)
    return 0


def lay_out_benchmark(
    source: Path, output: Path, scales: Sequence[int], *, overwrite: bool = False
) -> list[Path]:
    """Write HR/X<s> and LR_bicubic/X<s> for each scale. All folders appear together when all are complete.

    Gray images become three equal channels, as BasicSR reads them in any case.

    Returns:
        The folders written, HR and LR in turn.

    Raises:
        UserError: Impossible scales; no images, or two of one name; an unreadable or too small one; existing
            output.
    """
    check_scales(scales)
    files: dict[str, Path] = {}
    for relative in find_images(source, recursive=False):
        if relative.stem in files:
            raise UserError(
                f"{source} has both {files[relative.stem].name} and {relative}: rename or remove one"
            )
        files[relative.stem] = source / relative
    folders = [output / kind / f"X{scale}" for scale in scales for kind in ("HR", "LR_bicubic")]
    bar = tqdm(files.items(), f"making {output}", unit="image", disable=None)
    with publishing(folders, ("*.png",), overwrite) as partials, bar:
        for stem, path in bar:
            image = read_image(path)
            for scale, hr_folder, lr_folder in zip(scales, partials[::2], partials[1::2], strict=True):
                hr = crop_to_multiple(image, scale, str(path))
                (hr_folder / f"{stem}.png").write_bytes(encode_png(hr, _COMPRESSION))
                lr = encode_png(reduce_uint8(hr, scale), _COMPRESSION)
                (lr_folder / f"{stem}x{scale}.png").write_bytes(lr)
    return folders
