"""Figures that are published for these networks and their rivals, to stand beside what was measured.

From arXiv:2503.06671: PSNR in dB and SSIM on Y, a border of ``scale`` pixels cropped; and costs, on the
authors' GPU.
"""

from collections.abc import Mapping
from typing import NamedTuple

from esc_basicsr.options.recipes import BENCHMARKS

__all__ = [
    "ABLATION_FIGURES",
    "PUBLICATION",
    "TRAINING_SETS",
    "AblationFigures",
    "Costs",
    "published_costs",
    "published_figures",
]

PUBLICATION = "arXiv:2503.06671"

# What the networks were trained on; DFLIP is DIV2K + Flickr2K + LSDIR + DiverSeg-IP.
TRAINING_SETS = ("DIV2K", "DFLIP")

# training set, scale -> method -> PSNR/SSIM on each of `BENCHMARKS`; a dash where nothing is published
_FIGURES: dict[tuple[str, int], dict[str, str]] = {
    ("DIV2K", 2): {
        "SwinIR-light": "38.14/.9611 33.86/.9206 32.31/.9012 32.76/.9340 39.12/.9783",
        "ATD-light": "38.29/.9616 34.10/.9217 32.39/.9023 33.27/.9375 39.52/.9789",
        "HiT-SRF": "38.26/.9615 34.01/.9214 32.37/.9023 33.13/.9372 39.47/.9787",
        "MambaIRv2-light": "38.26/.9615 34.09/.9221 32.36/.9019 33.26/.9378 39.35/.9785",
        "ESC-FP": "38.27/.9617 34.09/.9219 32.37/.9022 33.22/.9375 39.40/.9784",
        "ESC-light": "38.24/.9615 33.98/.9211 32.35/.9020 33.05/.9363 39.33/.9786",
        "ESC": "38.35/.9619 34.11/.9223 32.41/.9027 33.46/.9395 39.54/.9790",
    },
    ("DIV2K", 3): {
        "SwinIR-light": "34.62/.9289 30.54/.8463 29.20/.8082 28.66/.8624 33.98/.9478",
        "ESC-FP": "34.72/.9300 30.67/.8483 29.30/.8107 29.12/.8706 34.56/-",
        "ESC-light": "34.61/.9295 30.52/.8475 29.26/.8102 28.93/.8679 34.33/.9495",
        "ESC": "34.84/.9308 30.74/.8493 29.34/.8118 29.28/.8739 34.66/.9512",
    },
    ("DIV2K", 4): {
        "SwinIR-light": "32.44/.8976 28.77/.7858 27.69/.7406 26.47/.7980 30.92/.9151",
        "SRFormer-light": "32.51/.8988 28.82/.7872 27.73/.7422 26.67/.8032 31.17/.9165",
        "ATD-light": "32.63/.8998 28.89/.7886 27.79/.7440 26.97/.8107 31.48/.9198",
        "HiT-SRF": "32.55/.8999 28.87/.7880 27.75/.7432 26.80/.8069 31.26/.9171",
        "MambaIRv2-light": "32.51/.8992 28.84/.7878 27.75/.7426 26.82/.8079 31.24/.9182",
        "OmniSR": "32.49/.8988 28.78/.7859 27.71/.7415 26.64/.8018 31.02/.9151",
        "RCAN": "32.63/.9002 28.87/.7889 27.77/.7436 26.82/.8087 31.22/.9173",
        "ESC-FP": "32.56/.8997 28.87/.7889 27.75/.7435 26.90/.8098 31.40/.9192",
        "ESC-light": "32.52/.8995 28.87/.7878 27.72/.7423 26.76/.8058 31.26/.9173",
        "ESC": "32.68/.9011 28.93/.7902 27.80/.7447 27.07/.8144 31.54/.9207",
    },
    ("DFLIP", 2): {"ESC": "38.34/.9618 34.42/.9235 32.50/.9036 33.86/.9424 39.73/.9795"},
    ("DFLIP", 3): {"ESC": "34.85/.9312 30.97/.8511 29.41/.8135 29.70/.8799 34.94/.9525"},
    ("DFLIP", 4): {
        "ATD-light": "32.52/.8995 28.93/.7896 27.79/.7443 27.18/.8150 31.47/.9208",
        "HiT-SRF": "32.55/.8997 28.96/.7897 27.77/.7443 27.07/.8130 31.59/.9208",
        "ESC": "32.79/.9025 29.06/.7927 27.85/.7466 27.45/.8229 31.87/.9239",
    },
}


class Costs(NamedTuple):
    """What is published for one image, 1280×720 output, float32, on the authors' GPU.

    Attributes:
        milliseconds: Latency; like the others None where it is not published.
        mebibytes: Peak memory.
        giga: Multiply-adds in G.
        thousands: Parameters in thousands.
    """

    milliseconds: float | None
    mebibytes: float | None
    giga: float | None
    thousands: float | None


# scale -> method -> ms, MB, G, K
_COSTS: dict[int, dict[str, str]] = {
    2: {
        "SwinIR-light": "1409.8 1287 244.2 910",
        "ATD-light": "733.5 2839 380.0 753",
        "HiT-SRF": "268.1 1804 226.5 847",
        "MambaIRv2-light": "580.4 2824 286.3 774",
        "ESC-FP": "94.3 627 239.8 524",
        "ESC-light": "73.2 830 359.4 603",
        "ESC": "120.9 831 592.0 947",
    },
    3: {
        "SwinIR-light": "331.7 596 110.8 918",
        "ESC-FP": "34.8 291 110.0 530",
        "ESC-light": "25.2 384 162.8 612",
        "ESC": "41.4 385 267.6 955",
    },
    4: {
        "SwinIR-light": "222.9 351 63.6 930",
        "SRFormer-light": "287.2 329 62.8 873",
        "ATD-light": "189.7 753 100.1 769",
        "HiT-SRF": "82.1 1331 58.0 866",
        "MambaIRv2-light": "153.4 748 75.6 790",
        "OmniSR": "22.5 273 50.9 792",
        "RCAN": "52.2 540 917.6 15592",
        "ESC-FP": "21.7 158 60.8 539",
        "ESC-light": "13.3 213 91.0 624",
        "ESC": "21.9 215 149.2 968",
    },
}


class AblationFigures(NamedTuple):
    """A row of the ablation: ESC ×2, trained on DIV2K; PSNR on Y in dB, latency on the authors' GPU."""

    set5: float
    urban100: float
    milliseconds: float


# row, as the shipped option files call it -> figures; ESC itself has no name there
ABLATION_FIGURES = {
    "": AblationFigures(38.35, 33.46, 120.9),
    "attention_only": AblationFigures(38.27, 33.23, 128.2),
    "conv_attention_only": AblationFigures(38.18, 32.91, 126.3),
    "kernel9": AblationFigures(38.33, 33.42, 117.1),
    "kernel17": AblationFigures(38.32, 33.40, 126.6),
    "no_dynamic_kernel": AblationFigures(38.31, 33.36, 119.7),
    "unshared_no_dynamic_kernel": AblationFigures(38.32, 33.37, 119.7),
    "window16": AblationFigures(38.24, 33.05, 118.0),
}


def published_costs(scale: int) -> dict[str, Costs]:
    """What is published of networks' costs at a scale, by method."""
    return {method: Costs(*map(float, line.split())) for method, line in _COSTS.get(scale, {}).items()}


def published_figures(training_set: str, scale: int) -> dict[str, dict[str, Mapping[str, float]]]:
    """What is published for networks of a scale that were trained on ``training_set``.

    Returns:
        method -> test set -> ``psnr`` and ``ssim``, as far as they are published; empty for another scale or
        training set.
    """
    return {
        method: dict(zip(BENCHMARKS, map(_figures, line.split()), strict=True))
        for method, line in _FIGURES.get((training_set, scale), {}).items()
    }


def _figures(text: str) -> dict[str, float]:
    figures = zip(("psnr", "ssim"), text.split("/"), strict=True)
    return {metric: float(figure) for metric, figure in figures if figure != "-"}
