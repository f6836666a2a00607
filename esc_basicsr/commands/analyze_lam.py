"""Local attribution maps: which LR pixels a network uses for the detail in a window of its output.

The image is cropped around the window, reduced by Pillow's bicubic filter, and upscaled by each network;
gradients are integrated from a blurred LR image to the sharp one (Gu and Dong, arXiv:2011.11265). The
diffusion index says how widely the map is spread, from near 0 to 100; it compares maps of one size.

  python -m esc_basicsr analyze lam --network ESC EDSR,num_in_ch=3,num_out_ch=3 -o DIR
  python -m esc_basicsr analyze lam --network a.pth b.pth --image photo.png --window 110 150 -o DIR

A network is what 'python -m esc_basicsr bench --help' lists. Writes lam.json, lam.md and lam.png.
"""

import argparse
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.lab.analysis.drawing import Attributed, draw_attribution
from esc_basicsr.lab.analysis.images import add_image_argument, load_image, reduce_by_pillow, to_tensor
from esc_basicsr.lab.analysis.local_attribution import (
    FOLD,
    INTEGRATIONS,
    LARGEST_SIGMA,
    LEAST_SIDE,
    Window,
    attribute,
    blur,
    detail,
    diffusion_index,
    relative_map,
)
from esc_basicsr.lab.analysis.networks import Bar, Row, Subject, analyze, subjects_of
from esc_basicsr.metrics.quality import Image

# gray, which red shows on, with a pattern that repeats
DEFAULT_IMAGE = "brick"
_SIZE = 16
_CROP = 256


class Scene(NamedTuple):
    """The part of an image that the networks are given, and the window in it."""

    hr: Image  # the part of the image that is looked at
    lr: Image
    left: int  # where it begins in the image
    top: int
    window: Window  # in `hr`

    @property
    def window_in_image(self) -> Window:
        """The window, counted from the image's corner."""
        return Window(self.left + self.window.x, self.top + self.window.y, self.window.size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analysis' arguments."""
    add_image_argument(parser, DEFAULT_IMAGE)
    parser.add_argument(
        "--window",
        type=int,
        nargs="+",
        metavar="N",
        help="X Y [SIZE]: left column, top row and side of the window, in the image's pixels "
        f"(default: {_SIZE}×{_SIZE}, centred)",
    )
    parser.add_argument(
        "--crop",
        type=int,
        default=_CROP,
        metavar="SIDE",
        help="of the square around the window that the networks are given, in the image's pixels; a "
        f"smaller image is taken whole (default: {_CROP})",
    )
    parser.add_argument("--fold", type=int, default=FOLD, help=f"steps of the path (default: {FOLD})")
    parser.add_argument(
        "--integration",
        choices=INTEGRATIONS,
        default=INTEGRATIONS[0],
        help="where a step's gradient is taken: at its right end, as the source does, or at its midpoint, "
        "which is more exact (default: right)",
    )


def run(args: argparse.Namespace) -> int:
    """Map each network, print a table, write the report."""
    if args.fold < 1:
        raise UserError(f"--fold must be at least 1, got {args.fold}.")
    image = load_image(args.image)
    subjects = subjects_of(args)
    scale = subjects[0].scale
    scene = make_scene(image, args.image, args.window, args.crop, scale)
    return analyze(
        args,
        "lam",
        [(subject, partial(_map, subject, scene, args)) for subject in subjects],
        steps=args.fold * len(subjects),
        table=_table,
        caption=lambda rows: _caption(args, scene, scale),
        settings={
            "image": args.image,
            "crop": [scene.left, scene.top, scene.hr.shape[1], scene.hr.shape[0]],
            "window": [*scene.window_in_image],
            "lr_size": list(scene.lr.shape[:2]),
            "scale": scale,
            "fold": args.fold,
            "integration": args.integration,
            "largest_sigma": LARGEST_SIGMA,
        },
        draw=lambda maps, caption: draw_attribution(scene.hr, scene.lr, scene.window, maps, caption),
    )


def make_scene(image: Image, name: str, window: list[int] | None, crop: int, scale: int) -> Scene:
    """Crop an image, (H, W, 3), to a square around a window, and reduce it.

    The window is X, Y and, if wanted, SIZE; None for the centre. The square's side is ``crop``, rounded down
    to a multiple of ``scale``.

    Raises:
        UserError: The window is none, or does not fit into the image or the crop.
    """
    height, width = image.shape[:2]
    if window is not None and len(window) not in (2, 3):
        raise UserError(f"--window: expected X Y or X Y SIZE, got {len(window)} numbers.")
    size = window[2] if window is not None and len(window) == 3 else _SIZE
    kept_height, kept_width = (min(side, crop) // scale * scale for side in (height, width))
    least = max(size + 1, LEAST_SIDE * scale)
    if size < 1:
        raise UserError(f"--window: SIZE must be at least 1, got {size}.")
    if min(kept_height, kept_width) < least:
        raise UserError(
            f"a window of {size} pixels at ×{scale} needs --crop and an image of at least "
            f"{-(-least // scale) * scale} pixels a side; got --crop {crop} and {name} of {width}×{height}."
        )
    x, y = window[:2] if window is not None else ((width - 1 - size) // 2, (height - 1 - size) // 2)
    if min(x, y) < 0 or x + size > width - 1 or y + size > height - 1:
        raise UserError(
            f"--window {x} {y} {size} does not lie in {name}: of {width}×{height} pixels X can be 0 to "
            f"{width - 1 - size} and Y 0 to {height - 1 - size}, as each pixel needs neighbours to its right "
            "and below."
        )
    left = min(max(x - (kept_width - 1 - size) // 2, 0), width - kept_width)
    top = min(max(y - (kept_height - 1 - size) // 2, 0), height - kept_height)
    hr = np.ascontiguousarray(image[top : top + kept_height, left : left + kept_width])
    return Scene(hr, reduce_by_pillow(hr, scale), left, top, Window(x - left, y - top, size))


def _map(subject: Subject, scene: Scene, args: argparse.Namespace, bar: Bar) -> tuple[Row, Attributed]:
    """Attribute the detail in the window to the LR image, for one network."""
    lq = to_tensor(scene.lr, torch.device(args.device))

    def functional(image: Tensor) -> Tensor:
        return detail(subject(image), scene.window)

    attribution = attribute(functional, subject.gradient, lq, args.fold, args.integration, bar.update)
    try:
        relative = relative_map(attribution)
    except ValueError as error:
        raise UserError(f"{subject.name}: {error}, so there is no map. Try another --window.") from error
    left, top, size = scene.window
    with torch.no_grad():
        sr = subject(lq)
        gained = detail(sr, scene.window) - functional(blur(lq.double(), LARGEST_SIGMA).to(lq.dtype))
    shown = sr[0, :, top : top + size, left : left + size].clamp(0, 1).mul(255).round().byte()
    index = diffusion_index(relative)
    row = {
        "diffusion_index": index,
        "sum": float(attribution.values.sum()),
        "detail_gained": float(gained),
    }
    return row, Attributed(subject.label, relative, index, shown.permute(1, 2, 0).cpu().numpy())


def _table(rows: list[Row]) -> str:
    head = ["network", "weights", "parameters", "diffusion index", "sum of attributions", "detail gained"]
    lines = []
    for row in rows:
        cells = [row["network"], row["weights"], f"{row['params']:,}", f"{row['diffusion_index']:.2f}"]
        lines.append([*cells, f"{row['sum']:.4g}", f"{row['detail_gained']:.4g}", f"{row['seconds']:.1f} s"])
    return markdown_table([*head, "time"], lines)


def _caption(args: argparse.Namespace, scene: Scene, scale: int) -> list[str]:
    height, width = scene.lr.shape[:2]
    x, y, size = scene.window_in_image
    where = "right ends" if args.integration == "right" else "midpoints"
    return [
        f"Local attribution maps of {args.image}: what each LR pixel contributed to the detail in a window "
        f"of the ×{scale} output, {size}×{size} at x {x}, y {y}. "
        f"Gradients at the {where} of {args.fold} steps from a blur of sigma {LARGEST_SIGMA} to the sharp "
        f"image; LR {width}×{height} by Pillow's bicubic filter. Attributions would add up to the detail "
        "gained on this path if steps were infinitely small. Diffusion indices compare maps of one size.",
        "Definition: Gu and Dong, arXiv:2011.11265; ours are the centred window where none is named, the "
        "crop, and a gradient of zero where the output is flat.",
    ]
