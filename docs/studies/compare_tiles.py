"""What tiles cost: photographs upscaled whole, strip by strip, in aligned tiles and in plain ones.

    python docs/studies/compare_tiles.py --model FILE -o DIR

Aligned tiles are those of `Upscaler` for what is too large for the memory; plain ones, of the same size, lie
anywhere and have no margin. All are compared with the whole image, by PSNR of 8-bit pixels on RGB, and with
the photograph whose bicubic reduction was upscaled, by PSNR on Y. Writes tiles.json, tiles.md and tiles.png:
where, and how much, tiles differ.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.fast.tiles import MARGIN, run_in_tiles
from esc_basicsr.lab.measure.report import make_folder, markdown_table, write_report
from esc_basicsr.weights.shipped import TrainedNetwork, load_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Image = npt.NDArray[np.uint8]

PHOTOGRAPHS = ("astronaut", "coffee", "hubble_deep_field", "retina")
PLAIN = "plain tiles"
_ENHANCED = 16  # times, of the differences in the picture


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
    pictures: dict[str, dict[str, Image]] = {}
    for name in tqdm(PHOTOGRAPHS, desc="photographs"):
        pictures[name] = _measure(trained, name, [side * window for side in args.windows], rows)
    results = {
        "network": trained.options,
        "margin": MARGIN * window,
        "torch": torch.__version__,
        "rows": rows,
    }
    text = _table(rows)
    print(text)
    if args.output is not None:
        write_report(args.output, "tiles", results, text, _draw(pictures))
    return 0


def _measure(
    trained: TrainedNetwork, name: str, sides: Sequence[int], rows: list[dict[str, Any]]
) -> dict[str, Image]:
    """Add the figures of a photograph; give its pictures for the smallest tiles."""
    gt = load_sample_image(name)
    scale = trained.scale
    gt = gt[: gt.shape[0] // scale * scale, : gt.shape[1] // scale * scale]
    lq = torch.from_numpy(reduce_uint8(gt, scale).astype(np.float32) / 255).permute(2, 0, 1)[None]
    window = int(trained.options["window_size"])
    run = functools.partial(_run, trained)
    whole = run(lq)
    with torch.enable_grad():  # in one piece: by strips it goes only without gradients
        plain = trained.network(lq).detach()
    pictures = {"whole": _picture(whole)}
    for side in sides:
        aligned = run_in_tiles(run, lq, scale, side, window)
        # as much memory
        naive = run_in_tiles(run, lq, scale, side + 2 * MARGIN * window, window, margin=0)
        pictures |= {} if len(pictures) > 1 else {"tiles": _picture(aligned), PLAIN: _picture(naive)}
        ways: dict[str, Tensor] = {"strips": whole, f"tiles of {side}": aligned, PLAIN: naive}
        for way, sr in ways.items():
            if way != "strips" or side == sides[0]:
                rows.append(
                    {
                        "photograph": name,
                        "way": way,
                        "side": None if way == "strips" else side,
                        "psnr_to_whole": _psnr(_picture(sr), _picture(plain)),
                        "psnr_y_gained": _luma_psnr(_picture(sr), gt, scale)
                        - _luma_psnr(_picture(plain), gt, scale),
                    }
                )
    return pictures


def _run(trained: TrainedNetwork, lq: Tensor) -> Tensor:
    with torch.inference_mode():
        return trained.network(lq)


def _picture(sr: Tensor) -> Image:
    return (sr[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _psnr(one: Image, other: Image) -> float:
    """In dB; infinite where they are equal."""
    error = float(np.mean((one.astype(float) - other) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _luma_psnr(sr: Image, gt: Image, scale: int) -> float:
    from basicsr.metrics import calculate_psnr

    pair = [np.ascontiguousarray(picture[:, :, ::-1]) for picture in (sr, gt)]
    return float(calculate_psnr(*pair, crop_border=scale, test_y_channel=True))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each way: over the photographs, the worst and the mean."""
    kinds = list(dict.fromkeys((row["way"], row["side"]) for row in rows))
    lines = []
    for way, side in kinds:
        own = [row for row in rows if (row["way"], row["side"]) == (way, side)]
        to_whole = [row["psnr_to_whole"] for row in own]
        gained = [row["psnr_y_gained"] for row in own]
        name = f"{way} of the same memory as tiles of {side}" if way == PLAIN else way
        lines.append(
            [name, *(f"{value:.2f} dB" for value in (min(to_whole), float(np.mean(to_whole)))),
             f"{min(gained):+.4f} dB", f"{float(np.mean(gained)):+.4f} dB"]
        )  # fmt: skip
    head = ["way", "PSNR to the whole, least", "mean", "PSNR on Y gained on GT, least", "mean"]
    return markdown_table(head, lines)


def _draw(pictures: dict[str, dict[str, Image]]) -> "Figure":
    """Each photograph, and where its smallest tiles differ from the whole."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.1 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), 3, squeeze=False)
    for row, (name, own) in zip(axes, pictures.items(), strict=True):
        row[0].imshow(own["whole"])
        row[0].set_title(name)
        for axis, way in zip(row[1:], ("tiles", PLAIN), strict=True):
            axis.imshow(_difference(own[way], own["whole"]))
            axis.set_title(f"{way}: difference × {_ENHANCED}")
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
