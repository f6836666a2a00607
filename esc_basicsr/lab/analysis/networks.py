"""The networks that are looked into: of one scale, and such that gradients reach their input."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from esc_basicsr.archs.variants import SCALES
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import FastNetwork
from esc_basicsr.lab.measure.measure import device_to_measure_on
from esc_basicsr.lab.networks.by_name import SpandrelNetwork, build, check_forms, scale_of, weights_of

__all__ = [
    "Subject",
    "add_network_arguments",
    "note_on_failures",
    "note_on_weights",
    "of_those_that_work",
    "subjects_of",
    "unclamped",
]

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Subject(NamedTuple):
    """A network that is looked into.

    Attributes:
        name: As it was named.
        net: In evaluation mode; its parameters take no gradients.
        scale: Upscaling factor.
        params: Number of parameters.
        weights: Where they come from: ``random``, the name of a file, or ``none`` if there are none.
        network: What tables and figures call it: its name, of a file without folders, and without its
            weights, unless another one would be called the same.
    """

    name: str
    net: nn.Module
    scale: int
    params: int
    weights: str
    network: str

    @property
    def label(self) -> str:
        """What a figure calls it."""
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
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            raise UserError(
                f"{self.name}: fails on an image of {size} ({said}). Try another size of image."
            ) from error
        expected = (1, 3, *(side * self.scale for side in lq.shape[-2:]))
        if tuple(sr.shape) != expected:
            raise UserError(
                f"{self.name}: made of an image of {size} one of {tuple(sr.shape)}, not {expected}."
            )
        return sr

    def gradient(self, functional: Tensor, lq: Tensor, again: bool = False) -> Tensor:
        """The gradient of what was made of ``lq`` with regard to it.

        Args:
            functional: A number.
            lq: The image, which requires gradients.
            again: Whether another gradient of the same output is wanted afterwards.

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


class _UnclampedSpandrelNetwork(nn.Module):
    """spandrel's call of a network without what keeps gradients from it: inference mode and clamping."""

    def __init__(self, network: SpandrelNetwork) -> None:
        super().__init__()
        self.model = network.model
        self.descriptor = network.descriptor

    def forward(self, x: Tensor) -> Tensor:
        """Upscale an image; padded by reflection to the size that the network requires, and cropped."""
        height, width = x.shape[-2:]
        right, bottom = self.descriptor.size_requirements.get_padding(width, height)
        padded = F.pad(x, (0, right, 0, bottom), mode="reflect") if right or bottom else x
        sr: Tensor = self.descriptor._call_fn(self.model, padded)
        scale = self.descriptor.scale
        return sr[..., : height * scale, : width * scale]


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every analysis has: ``--network``, ``--scale``, ``--device``, ``--output``."""
    parser.add_argument(
        "--network", nargs="+", default=["ESC"], help="what to look into (default: ESC, with random weights)"
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
        "-o", "--output", type=Path, required=True, help="folder for a JSON file, a table and a picture"
    )


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """Build the networks that were asked for, each once.

    Raises:
        UserError: One cannot be built or does not upscale an RGB image, they differ in scale, or there is no
            such device.
    """
    device = device_to_measure_on(argparse.Namespace(device=args.device, repeats=1, warmup=0))
    names = list(dict.fromkeys(args.network))
    check_forms(names, device, torch.float32)
    scales = {name: scale_of(name, args.scale) for name in names}
    if len(set(scales.values())) > 1:
        listed = ", ".join(f"{name} ×{scale}" for name, scale in scales.items())
        raise UserError(f"these networks differ in scale: {listed}. Look into one scale at a time.")
    subjects = [_subject(name, scale, device) for name, scale in scales.items()]
    called = Counter(subject.network for subject in subjects)
    return [
        subject if called[subject.network] == 1 else subject._replace(network=subject.name)
        for subject in subjects
    ]


def note_on_weights(subjects: Sequence[Subject]) -> str:
    """What a figure of these networks must say of their weights."""
    if all(subject.weights != "random" for subject in subjects):
        return ""
    return "Random weights show what an architecture connects, not what a trained network uses."


def note_on_failures(failures: str) -> str:
    """What a figure must say of networks that are missing from it."""
    return f" Left out: {failures}" if failures else ""


def unclamped(net: nn.Module) -> nn.Module:
    """Return what of a network lets gradients through, and shows its layers."""
    if isinstance(net, FastNetwork):
        return net.net
    return _UnclampedSpandrelNetwork(net) if isinstance(net, SpandrelNetwork) else net


def of_those_that_work(look: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> tuple[list[_Result], str]:
    """Look into networks one by one; one that fails does not take with it what was found of the others.

    Returns:
        What was found, and what is to be said of those that failed.

    Raises:
        UserError: All failed.
    """
    found: list[_Result] = []
    failures: list[str] = []
    for job in jobs:
        try:
            found.append(look(job))
        except UserError as error:
            failures.append(str(error))
    if not found:
        raise UserError("\n".join(failures))
    return found, "\n".join(failures)


def _subject(name: str, scale: int, device: torch.device) -> Subject:
    net = build(name, scale)
    params = sum(parameter.numel() for parameter in net.parameters())
    weights = "none" if not params else weights_of(name) or "random"
    net = unclamped(net).to(device).eval()
    for parameter in net.parameters():  # TorchScript has no such method of the whole
        parameter.requires_grad_(False)
    network, _, _ = name.partition(",weights=")
    is_file = Path(network).suffix.lower() in (".yml", ".yaml") or weights == name
    return Subject(name, net, scale, params, weights, Path(network).name if is_file else network)
