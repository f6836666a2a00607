"""Effective receptive fields: how far from a pixel a network looks, averaged over images.

S is the positive part of the gradient of the output's centre with regard to the LR image, summed over
colours and averaged over images, as MambaIR (arXiv:2402.15648) takes it for super-resolution. The centre
is one LR pixel's outputs, and is put at several positions in a window, over which S is averaged: ESC's
windows do not shift, so that one position would tell how far a pixel there can see, not the network.

  python -m esc_basicsr analyze erf --network ESC ESC-light -o DIR
  python -m esc_basicsr analyze erf --network a.pth b.pth --images Urban100 --positions 8 -o DIR

A network is what 'python -m esc_basicsr bench --help' lists. Images are high-resolution ones: their
central parts are reduced by Pillow's bicubic filter. Writes erf.json, erf.md and erf.png.
"""

import argparse
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.lab.analysis.drawing import Field, draw_fields
from esc_basicsr.lab.analysis.features import Values
from esc_basicsr.lab.analysis.images import add_images_argument, central_lr, image_names, to_tensor
from esc_basicsr.lab.analysis.networks import Bar, Row, Subject, analyze, subjects_of
from esc_basicsr.lab.analysis.receptive_field import (
    aligned_field,
    log_scaled,
    luo_side,
    positions_in_window,
    positive_gradient,
    smallest_squares,
    square_shares,
)
from esc_basicsr.metrics.quality import Image

SHARES = (0.2, 0.3, 0.5, 0.99)
_SIZE = 120
_WINDOW = 32
_POSITIONS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the analysis' arguments."""
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
    size, window = args.size, args.window_size
    if not 1 <= args.positions <= window <= size:
        raise UserError(
            "expected 1 <= --positions <= --window-size <= --size, got "
            f"{args.positions}, {window} and {size}."
        )
    names = image_names(args.images)
    subjects = subjects_of(args)
    scale = subjects[0].scale
    images = {name: central_lr(name, size, size, size, scale) for name in names}
    positions = positions_in_window(size, window, args.positions)
    side = size - max(positions) + min(positions)
    return analyze(
        args,
        "erf",
        [
            (subject, partial(_measure, subject, images, positions, torch.device(args.device)))
            for subject in subjects
        ],
        steps=len(subjects) * len(images) * len(positions) ** 2,
        table=_table,
        caption=lambda rows: _caption(args, scale, min(row["images"] for row in rows), side),
        settings={
            "images": names,
            "lr_size": [size, size],
            "scale": scale,
            "centres": positions,
            "window_size": window,
            "field_size": [side, side],
        },
        draw=draw_fields,
    )


def _measure(
    subject: Subject, images: Mapping[str, Image], positions: list[int], device: torch.device, bar: Bar
) -> tuple[Row, Field]:
    """Average one network's field over images."""
    usable: list[Values] = []
    centre = (0, 0)
    for name, image in images.items():
        field, centre = _field_of(subject, to_tensor(image, device), positions, bar)
        if np.isfinite(field).all():
            usable.append(field)
        else:
            logger.warning("%s: %s is left out: its gradient is not finite.", subject.name, name)
    if not usable:
        raise UserError(f"{subject.name}: no image has a finite gradient.")
    mean: Values = np.mean(usable, axis=0)
    row: Row = {
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
        row[f"{kind}_shares"] = held.tolist()
    return row, Field(subject.label, mean, centre)


def _field_of(
    subject: Subject, lq: torch.Tensor, positions: list[int], bar: Bar
) -> tuple[Values, tuple[int, int]]:
    """Average S of one image over the centre's positions; give it and its centre."""
    s = subject.scale
    lq.requires_grad_()
    with torch.enable_grad():
        sr = subject(lq)  # once for all positions

    def field_at(row: int, column: int) -> Values:
        outputs = sr[..., row * s : (row + 1) * s, column * s : (column + 1) * s]
        with torch.enable_grad():
            field = positive_gradient(subject.gradient(outputs.sum(), lq, again=True))
        bar.update()
        return field

    return aligned_field(field_at, positions, positions)


def _table(rows: list[Row]) -> str:
    shares = [f"{share:.0%}" for share in SHARES]
    head = ["network", "weights", "parameters", *(f"r({share}), raw" for share in shares)]
    head += [*(f"r({share}), log" for share in shares), "Luo's side", "time"]
    lines = []
    for row in rows:
        squares = [row[kind][share] for kind in ("raw", "log") for share in shares]
        cells = [f"{square['area']:.1%} ({square['side']})" for square in squares]
        named = [row["network"], row["weights"], f"{row['params']:,}"]
        lines.append([*named, *cells, f"{row['luo_side']:.1f}", f"{row['seconds']:.1f} s"])
    return markdown_table(head, lines)


def _caption(args: argparse.Namespace, s: int, images: int, side: int) -> list[str]:
    size, window = args.size, args.window_size
    return [
        f"Effective receptive fields: S, the positive part of the gradient of an LR pixel's {s}×{s} outputs "
        f"with regard to the LR image, averaged over {images} images ({size}×{size}, by Pillow's "
        f"bicubic filter) and {args.positions**2} positions of that pixel in a window of {window}×{window}. "
        f"Red is zero, green the maximum; the field has the {side}×{side} pixels that all positions "
        "share. r(t): the share of the field, and in brackets the side, of the smallest centred square that "
        "holds more than t of S (raw) or of log10(S + 1) (log); outlined for 50 % (solid) and 99 % (dotted). "
        "Luo's side: root of the number of pixels above 4.55 % of the centre's value.",
        "Drawn as in arXiv:2203.06717 and arXiv:2402.15648; ours are crops instead of resized images, a "
        "whole LR pixel as the centre, its positions, and r counted from the centre to the border.",
    ]
