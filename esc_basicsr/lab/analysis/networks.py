"""The networks that are looked into: of one scale, and such that gradients reach their input; reports."""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from esc_basicsr.archs.variants import SCALES
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import FastNetwork
from esc_basicsr.lab.measure.measure import device_to_measure_on
from esc_basicsr.lab.measure.results import make_folder, publish
from esc_basicsr.lab.networks.by_name import (
    build_network,
    check_implementations,
    described,
    scale_of,
    weights_of,
)

_Shown = TypeVar("_Shown")
Row = dict[str, Any]
Bar: TypeAlias = "tqdm[Any]"


class Subject(NamedTuple):
    """A network that is looked into, in evaluation mode; its parameters take no gradients."""

    name: str  # as it was named
    net: nn.Module
    scale: int
    params: int
    weights: str  # where they come from: "random", the name of a file, or "none" if there are none
    # what tables and figures call it: its name, of a file without folders, and without its weights, unless
    # another one would be called the same
    network: str

    @property
    def label(self) -> str:
        """Its name in figures."""
        random = ", random weights" if self.weights == "random" else ""
        return f"{self.network} ×{self.scale}{random}"

    def __call__(self, lq: Tensor) -> Tensor:
        """Upscale one image, (1, 3, H, W) in [0, 1]; neither clamped nor detached.

        Raises:
            UserError: The network fails on an image of this size, or gives none of the expected one.
        """
        size = (1, 3, *lq.shape[-2:])
        try:
            sr = self.net(lq.clone())  # a network may overwrite what it is given
        except UserError:
            raise
        except Exception as error:  # whatever a foreign network raises, want of memory included
            raise UserError(
                f"{self.name}: fails on an image of {size} ({described(error)}). Try another size of image."
            ) from error
        expected = (1, 3, *(side * self.scale for side in lq.shape[-2:]))
        if tuple(sr.shape) != expected:
            raise UserError(
                f"{self.name}: made of an image of {size} one of {tuple(sr.shape)}, not {expected}."
            )
        return sr

    def gradient(self, functional: Tensor, lq: Tensor, again: bool = False) -> Tensor:
        """Return the gradient of a number that was made of an image, which requires gradients.

        ``again``: another one of the same output is wanted afterwards.

        Raises:
            UserError: No gradient reaches the image.
        """
        try:
            (gradient,) = torch.autograd.grad(functional, lq, retain_graph=again)
        except RuntimeError as error:
            raise UserError(
                f"{self.name}: no gradient reaches the image through this network ({error}). Networks whose "
                "operations have no gradients cannot be looked into this way."
            ) from error
        return gradient


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every analysis has: ``--network``, ``--scale``, ``--device``, ``--output``."""
    parser.add_argument(
        "--network",
        nargs="+",
        default=["ESC"],
        help="what to look into (default: ESC, with random weights); a TorchScript file, whose code runs, as "
        "torchscript:FILE",
    )
    parser.add_argument(
        "--scale",
        type=int,
        choices=SCALES,
        default=4,
        help="of networks that have no scale of their own, as a checkpoint has (default: 4)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for a JSON file, a table and a figure"
    )


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """Build the networks that were asked for, each once.

    Raises:
        UserError: One cannot be built or does not upscale an RGB image, they differ in scale, or there is no
            such device.
    """
    device = device_to_measure_on(args.device)
    names = list(dict.fromkeys(args.network))
    check_implementations(names, device, torch.float32)
    scales = {name: scale_of(name, args.scale) for name in names}
    if len(set(scales.values())) > 1:
        listed = ", ".join(f"{name} ×{scale}" for name, scale in scales.items())
        raise UserError(f"these networks differ in scale: {listed}. Look into one scale at a time.")
    subjects = [_subject(name, scale, device) for name, scale in scales.items()]
    called = Counter(subject.network for subject in subjects)
    return [one if called[one.network] == 1 else one._replace(network=one.name) for one in subjects]


def _subject(name: str, scale: int, device: torch.device) -> Subject:
    net = build_network(name, scale).to(device).eval()
    if isinstance(net, FastNetwork):
        net = net.net  # whose layers can be seen
    params = sum(parameter.numel() for parameter in net.parameters())
    weights = "none" if not params else weights_of(name) or "random"
    for parameter in net.parameters():  # TorchScript has no such method of the whole
        parameter.requires_grad_(False)
    network, _, _ = name.partition(",weights=")
    is_file = Path(network).suffix.lower() in (".yml", ".yaml") or weights == name
    return Subject(name, net, scale, params, weights, Path(network).name if is_file else network)


def analyze(
    args: argparse.Namespace,
    stem: str,
    jobs: Sequence[tuple[Subject, Callable[[Bar], tuple[Row, _Shown]]]],
    steps: int,
    table: Callable[[list[Row]], str],
    caption: Callable[[list[Row]], list[str]],
    settings: Mapping[str, Any],
    draw: Callable[[list[_Shown], str], Figure],
) -> int:
    """Look into networks one by one, print a table, and write the report.

    One that fails does not take with it what was found of the others.

    Args:
        args: What `add_network_arguments` declared.
        stem: Name of the files.
        jobs: Networks, each with a function that updates the bar, and returns figures and what is drawn.
        steps: Updates of the bar in all.
        table: Writes the figures as a table, which ``caption`` explains.
        caption: Gives sentences.
        settings: How the figures came about.
        draw: Draws, with a caption.

    Raises:
        UserError: One failed; the report of the others is written.
    """
    make_folder(args.output)
    found: list[tuple[Row, _Shown]] = []
    failures: list[str] = []
    with tqdm(total=steps, desc=stem) as bar:
        for subject, look in jobs:
            bar.set_postfix_str(subject.label)
            row: Row = {"network": subject.network, "weights": subject.weights, "params": subject.params}
            start = time.perf_counter()
            try:
                figures, one = look(bar)
            except UserError as error:
                failures.append(str(error))
            else:
                found.append((row | figures | {"seconds": time.perf_counter() - start}, one))
    failed = "\n".join(failures)
    if not found:
        raise UserError(failed)
    rows, shown = [row for row, _ in found], [one for _, one in found]
    sentences = caption(rows)
    if any(row["weights"] == "random" for row in rows):
        sentences.append(
            "Random weights show what an architecture connects, not what a trained network uses."
        )
    text = " ".join([*sentences, f"Left out: {failed}" if failed else ""]).rstrip()
    publish(
        args.output,
        stem,
        f"{table(rows)}\n\n{text}",
        settings,
        rows,
        torch.device(args.device),
        lambda: draw(shown, text),
    )
    if failed:
        raise UserError(failed)
    return 0
