"""The cost of tiles: images upscaled whole, by row chunks, in aligned tiles and in plain ones.

    python docs/studies/compare_tiles.py --model FILE -o DIR

Aligned tiles are those of `Upscaler` for what is too large for the memory; plain ones, of the same size, lie
anywhere and have no margin. All are compared with the whole image, by PSNR of 8-bit pixels on RGB, and with
the image whose bicubic reduction was upscaled, by PSNR on Y. Writes tiles.json, tiles.md and tiles.png:
where, and how much, tiles differ.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from esc_basicsr import fast
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.photos import load_photograph
from esc_basicsr.fast.tiles import MARGIN, run_in_tiles
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.weights.shipped import TrainedNetwork, load_network

Image = npt.NDArray[np.uint8]

IMAGES = ("astronaut", "coffee", "hubble_deep_field", "retina")
PLAIN = "plain tiles"
_ENHANCED = 16  # times, of the differences in the figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, help="a checkpoint of ESC, or the name of a shipped one")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[1, 2, 4, 8], help="sides of the tiles (default: 1 2 4 8)"
    )
    parser.add_argument("-o", "--output", type=Path, help="folder for tiles.json, tiles.md and tiles.png")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the report."""
    if min(args.windows) < 1:
        raise UserError(f"--windows must be at least 1, got {min(args.windows)}.")
    make_folder(args.output)
    trained = load_network(args.model)
    window = int(trained.options["window_size"])
    rows: list[dict[str, Any]] = []
    images: dict[str, dict[str, Image]] = {}
    for name in tqdm(IMAGES, desc="images"):
        images[name] = _measure(trained, name, [side * window for side in args.windows], rows)
    settings = {"network": trained.options, "margin": MARGIN * window}
    draw = functools.partial(_draw, images)
    publish(args.output, "tiles", _table(rows), settings, rows, torch.device("cpu"), draw)
    return 0


def _measure(
    trained: TrainedNetwork, name: str, sides: Sequence[int], rows: list[dict[str, Any]]
) -> dict[str, Image]:
    """Add the figures of a image; give its images for the smallest tiles."""
    gt = load_photograph(name)
    scale = trained.scale
    gt = gt[: gt.shape[0] // scale * scale, : gt.shape[1] // scale * scale]
    lq = torch.from_numpy(reduce_uint8(gt, scale).astype(np.float32) / 255).permute(2, 0, 1)[None]
    window = int(trained.options["window_size"])
    run = functools.partial(_run, fast.prepare(trained.network))
    whole = run(lq)
    plain = _run(trained.network, lq)
    images = {"whole": _to_image(whole)}
    for side in sides:
        aligned = run_in_tiles(run, lq, scale, side, window)
        # as much memory
        naive = run_in_tiles(run, lq, scale, side + 2 * MARGIN * window, window, margin=0)
        images |= {} if len(images) > 1 else {"tiles": _to_image(aligned), PLAIN: _to_image(naive)}
        methods: dict[str, Tensor] = {"row chunks": whole, f"tiles of {side}": aligned, PLAIN: naive}
        for method, sr in methods.items():
            if method != "row chunks" or side == sides[0]:
                rows.append(
                    {
                        "image": name,
                        "method": method,
                        "side": None if method == "row chunks" else side,
                        "psnr_to_whole": _psnr(_to_image(sr), _to_image(plain)),
                        "psnr_y_gained": _luma_psnr(_to_image(sr), gt, scale)
                        - _luma_psnr(_to_image(plain), gt, scale),
                    }
                )
    return images


def _run(net: nn.Module, lq: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(lq)


def _to_image(sr: Tensor) -> Image:
    return (sr[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _psnr(one: Image, other: Image) -> float:
    """In dB; infinite where they are equal."""
    error = float(np.mean((one.astype(float) - other) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _luma_psnr(sr: Image, gt: Image, scale: int) -> float:
    from basicsr.metrics import calculate_psnr

    pair = [np.ascontiguousarray(image[:, :, ::-1]) for image in (sr, gt)]
    return float(calculate_psnr(*pair, crop_border=scale, test_y_channel=True))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Write a row for each method: over the images, the worst and the mean."""
    kinds = list(dict.fromkeys((row["method"], row["side"]) for row in rows))
    lines = []
    for method, side in kinds:
        own = [row for row in rows if (row["method"], row["side"]) == (method, side)]
        to_whole = [row["psnr_to_whole"] for row in own]
        gained = [row["psnr_y_gained"] for row in own]
        name = f"{method} of the same memory as tiles of {side}" if method == PLAIN else method
        lines.append(
            [name, *(f"{value:.2f} dB" for value in (min(to_whole), float(np.mean(to_whole)))),
             f"{min(gained):+.4f} dB", f"{float(np.mean(gained)):+.4f} dB"]
        )  # fmt: skip
    head = ["method", "PSNR to the whole, least", "mean", "PSNR on Y gained on GT, least", "mean"]
    return markdown_table(head, lines)


def _draw(images: dict[str, dict[str, Image]]) -> Figure:
    """Draw each image, and where its smallest tiles differ from the whole."""
    figure = Figure(figsize=(9.6, 3.1 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 3, squeeze=False)
    for row, (name, own) in zip(axes, images.items(), strict=True):
        row[0].imshow(own["whole"])
        row[0].set_title(name)
        for axis, method in zip(row[1:], ("tiles", PLAIN), strict=True):
            axis.imshow(_difference(own[method], own["whole"]))
            axis.set_title(f"{method}: difference × {_ENHANCED}")
        for axis in row:
            axis.axis("off")
    return figure


def _difference(one: Image, other: Image) -> Image:
    return np.clip(np.abs(one.astype(int) - other) * _ENHANCED, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(
        run_command(
            "compare_tiles",
            sys.argv[1:],
            prog="python docs/studies/compare_tiles.py",
        )
    )
