"""Effective receptive fields: how far from a pixel a network looks, averaged over photographs.

S is the positive part of the gradient of the output's centre with regard to the LR image, summed over
colours and averaged over photographs, as MambaIR (arXiv:2402.15648) takes it for super-resolution. The centre
is one LR pixel's outputs, and is put at several positions in a window, over which S is averaged: ESC's
windows do not shift, so that one position would tell how far a pixel there can see, not the network.

  python -m esc_basicsr analyze erf --network ESC ESC-light -o DIR
  python -m esc_basicsr analyze erf --network a.pth b.pth --images Urban100 --positions 8 -o DIR

A network is what 'python -m esc_basicsr bench --help' lists. Photographs are high-resolution ones: their
central parts are reduced by Pillow's bicubic filter. Writes erf.json, erf.md and erf.png.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.lab.analysis.crops import central_lr
from esc_basicsr.lab.analysis.images import Pixels, add_images_argument, image_names, to_tensor
from esc_basicsr.lab.analysis.networks import (
    Subject,
    add_network_arguments,
    note_on_failures,
    note_on_weights,
    of_those_that_work,
    subjects_of,
)
from esc_basicsr.lab.analysis.receptive_field import (
    Map,
    aligned_field,
    log_scaled,
    luo_side,
    positions_in_window,
    positive_gradient,
    smallest_squares,
    square_shares,
)
from esc_basicsr.lab.analysis.receptive_field_drawing import Field, draw
from esc_basicsr.lab.measure.measure import describe_machine
from esc_basicsr.lab.measure.report import make_folder, markdown_table, write_report

SHARES = (0.2, 0.3, 0.5, 0.99)
_SIZE = 120
_WINDOW = 32
_POSITIONS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analysis' arguments."""
    add_network_arguments(parser)
    add_images_argument(parser)
    parser.add_argument("--size", type=int, default=_SIZE, help=f"side of the LR images (default: {_SIZE})")
    parser.add_argument(
        "--positions",
        type=int,
        default=_POSITIONS,
        metavar="P",
        help=f"rows and columns of a window in which the centre is put, P×P in all; 1: no others than the "
        f"image's centre (default: {_POSITIONS})",
    )
    parser.add_argument(
        "--window-size",
        type=int,
        default=_WINDOW,
        help=f"side of that window, in LR pixels (default: {_WINDOW}, ESC's)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw each network's field, print a table, write the report."""
    if not 1 <= args.positions <= args.window_size <= args.size:
        raise UserError(
            "expected 1 <= --positions <= --window-size <= --size, got "
            f"{args.positions}, {args.window_size} and {args.size}."
        )
    names = image_names(args.images)
    subjects = subjects_of(args)
    size = args.size
    images = {name: central_lr(name, size, size, size, subjects[0].scale) for name in names}
    make_folder(args.output)
    positions = positions_in_window(args.size, args.window_size, args.positions)
    gradients = len(subjects) * len(images) * len(positions) ** 2
    with tqdm(total=gradients, desc="receptive fields", unit="gradient") as bar:

        def measure(subject: Subject) -> tuple[dict[str, Any], Field]:
            bar.set_postfix_str(subject.network)
            return _measure(subject, images, positions, torch.device(args.device), bar)

        found, failures = of_those_that_work(measure, subjects)
    rows, fields = [row for row, _ in found], [field for _, field in found]
    caption = _caption(args, subjects, min(row["images"] for row in rows), fields[0].values.shape)
    caption += note_on_failures(failures)
    text = f"{_table(rows)}\n\n{caption}"
    print(text)
    settings = {
        "images": names,
        "lr_size": [args.size, args.size],
        "scale": subjects[0].scale,
        "centres": positions,
        "window_size": args.window_size,
        "field_size": list(fields[0].values.shape),
        "machine": describe_machine(torch.device(args.device)),
    }
    write_report(args.output, "erf", {"settings": settings, "rows": rows}, text, draw(fields, caption))
    if failures:
        raise UserError(failures)
    return 0


def _measure(
    subject: Subject,
    images: Mapping[str, Pixels],
    positions: list[int],
    device: torch.device,
    bar: "tqdm[Any]",
) -> tuple[dict[str, Any], Field]:
    """One network's figures, and what is drawn of it."""
    start = time.perf_counter()
    usable: list[Map] = []
    centre = (0, 0)
    for name, image in images.items():
        field, centre = _field_of(subject, to_tensor(image, device), positions, bar)
        if np.isfinite(field).all():
            usable.append(field)
        else:
            logger.warning("%s: %s is left out: its gradient is not finite.", subject.name, name)
    if not usable:
        raise UserError(f"{subject.name}: no image has a finite gradient.")
    mean: Map = np.mean(usable, axis=0)
    row: dict[str, Any] = {
        "network": subject.network,
        "weights": subject.weights,
        "params": subject.params,
        "images": len(usable),
        "positions": len(positions) ** 2,
        "luo_side": luo_side(mean, centre),
    }
    for kind, values in (("raw", mean), ("log", log_scaled(mean))):
        try:
            squares = smallest_squares(values, centre, SHARES)
        except ValueError as error:
            raise UserError(
                f"{subject.name}: {error}: its output's centre does not depend on the image."
            ) from error
        held, _ = square_shares(values, centre)
        row[kind] = {f"{share:.0%}": square._asdict() for share, square in zip(SHARES, squares, strict=True)}
        row[f"{kind}_shares"] = [float(share) for share in held]
    row["seconds"] = time.perf_counter() - start
    return row, Field(subject.label, mean, centre)


def _field_of(
    subject: Subject, lq: torch.Tensor, positions: list[int], bar: "tqdm[Any]"
) -> tuple[Map, tuple[int, int]]:
    """S of one image, averaged over the centre's positions, and the centre."""
    s = subject.scale
    lq.requires_grad_()
    with torch.enable_grad():
        sr = subject(lq)  # once for all positions

    def field_at(row: int, column: int) -> Map:
        outputs = sr[..., row * s : (row + 1) * s, column * s : (column + 1) * s]
        with torch.enable_grad():
            field = positive_gradient(subject.gradient(outputs.sum(), lq, again=True))
        bar.update()
        return field

    return aligned_field(field_at, positions, positions)


def _table(rows: list[dict[str, Any]]) -> str:
    shares = [f"{share:.0%}" for share in SHARES]
    head = ["network", "weights", "parameters", *(f"r({share}), raw" for share in shares)]
    head += [*(f"r({share}), log" for share in shares), "Luo's side", "time"]
    lines = []
    for row in rows:
        squares = [row[kind][share] for kind in ("raw", "log") for share in shares]
        lines.append(
            [
                row["network"],
                row["weights"],
                f"{row['params']:,}",
                *(f"{square['area']:.1%} ({square['side']})" for square in squares),
                f"{row['luo_side']:.1f}",
                f"{row['seconds']:.1f} s",
            ]
        )
    return markdown_table(head, lines)


def _caption(args: argparse.Namespace, subjects: list[Subject], images: int, field: tuple[int, ...]) -> str:
    s, size, window = subjects[0].scale, args.size, args.window_size
    parts = [
        f"Effective receptive fields: S, the positive part of the gradient of an LR pixel's {s}×{s} outputs "
        f"with regard to the LR image, averaged over {images} photographs ({size}×{size}, by Pillow's "
        f"bicubic filter) and {args.positions**2} positions of that pixel in a window of {window}×{window}. "
        f"Red is zero, green the maximum; the field has the {field[1]}×{field[0]} pixels that all positions "
        "share. r(t): the share of the field, and in brackets the side, of the smallest centred square that "
        "holds more than t of S (raw) or of log10(S + 1) (log); outlined for 50 % (solid) and 99 % (dotted). "
        "Luo's side: root of the number of pixels above 4.55 % of the centre's value.",
        "Drawn as in arXiv:2203.06717 and arXiv:2402.15648; ours are crops instead of resized images, a "
        "whole LR pixel as the centre, its positions, and r counted from the centre to the border.",
        note_on_weights(subjects),
    ]
    return " ".join(parts).rstrip()
