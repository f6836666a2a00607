"""Compare methods of loading HR crops and their LR: samples a second of one core, and the LR that they make.

    python docs/studies/compare_loaders.py -o OUT

The plain method decodes a whole record of the LMDB, crops, flips and transposes it, and reduces the crop by
Pillow's bicubic filter. The others are DFLIPDataset's: on compressed records, on stored ones, and with LR
left to the model. They are timed in turn, through PyTorch's loader, in one process and one thread, on records
that are in memory already. Prints a Markdown table; with -o, writes OUT/loader.json and OUT/loader.png.
"""

import argparse
import functools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import mmengine
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from esc_basicsr.archs.variants import SCALES
from esc_basicsr.common.command_line import run_command
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.common.timing import median_times
from esc_basicsr.data.building.image_keys import collect_images
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.image_folder import read_image
from esc_basicsr.data.lmdb_reader import ImageLMDB
from esc_basicsr.data.photos import load_photograph, photograph_names
from esc_basicsr.lab.measure.results import describe_machine
from esc_basicsr.options.recipes import Schedule

Batch = dict[str, Any]
Method = Callable[[], Iterator[Batch]]  # a pass over the samples

LR_PATCH = Schedule().lr_patch  # as published
PLAIN = "plain, compressed records"
OURS = "ours, compressed records"
STORED = "ours, stored records"
HR_ALONE = "ours, stored records, HR alone"
ON_DEVICE = "the same, and LR of the batch on the CPU"


class PlainDataset(Dataset[dict[str, Tensor]]):
    """Random crops and their LR, as a plain data set makes them; drawn as DFLIPDataset draws them."""

    def __init__(self, images: ImageLMDB, scale: int) -> None:
        self._images = images
        self._scale = scale
        self._size = LR_PATCH * scale

    def __len__(self) -> int:
        """Images of the LMDB."""
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Decode one image, crop, augment and reduce it."""
        image = self._images.read(index)
        top = random.randint(0, image.shape[0] - self._size)
        left = random.randint(0, image.shape[1] - self._size)
        hr = image[top : top + self._size, left : left + self._size]
        if random.random() < 0.5:
            hr = hr[:, ::-1]
        if random.random() < 0.5:
            hr = hr[::-1]
        if random.random() < 0.5:
            hr = hr.transpose(1, 0, 2)
        hr = np.ascontiguousarray(hr[:, :, ::-1])
        lr = Image.fromarray(hr).resize((LR_PATCH, LR_PATCH), Image.Resampling.BICUBIC)
        return {"lq": _to_tensor(np.asarray(lr)), "gt": _to_tensor(hr)}


def _to_tensor(image: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)


def methods(folders: Mapping[int, Path], scale: int, samples: int, batch: int) -> dict[str, Method]:
    """List what is compared, by name, over the LMDBs of compression 1 and 0."""

    def ours(compression: int, lq_on_device: bool = False) -> Dataset[Any]:
        options = {"name": "images", "phase": "train", "scale": scale, "gt_size": LR_PATCH * scale}
        options |= {"sources": [{"dataroot_gt": folders[compression]}], "lq_on_device": lq_on_device}
        return DFLIPDataset(options | {"use_hflip": True, "use_rot": True})

    def a_pass(data_set: Any) -> Method:
        # evenly over all images
        indices = [number * len(data_set) // samples for number in range(samples)]
        return functools.partial(iter, DataLoader(Subset(data_set, indices), batch))

    def with_lr(hr_alone: Method) -> Iterator[Batch]:
        for item in hr_alone():
            yield make_pair(item["gt"], scale, torch.float64)

    hr_alone = a_pass(ours(0, lq_on_device=True))
    return {
        PLAIN: a_pass(PlainDataset(ImageLMDB(folders[1]), scale)),
        "plain, stored records": a_pass(PlainDataset(ImageLMDB(folders[0]), scale)),
        OURS: a_pass(ours(1)),
        STORED: a_pass(ours(0)),
        HR_ALONE: hr_alone,
        ON_DEVICE: functools.partial(with_lr, hr_alone),
    }


def levels(method: Method) -> tuple[Tensor, Tensor]:
    """Give LR and HR of all samples, equal ones for equal methods, in 8-bit levels."""
    random.seed(0)
    batches = list(method())
    lq, gt = (torch.cat([batch[key] for batch in batches]) * 255 for key in ("lq", "gt"))
    return lq.round().int(), gt.round().int()


def differences_of(lq: Tensor, other: Tensor) -> dict[str, float]:
    """Compare levels: largest and mean difference, both two pixels off the border, and their number."""
    difference = (lq - other).abs()
    inner = difference[..., 2:-2, 2:-2]
    return {
        "largest": int(difference.max()),
        "mean": float(difference.float().mean()),
        "inner_largest": int(inner.max()),
        "inner_mean": float(inner.float().mean()),
        "values": difference.numel(),
        "differing": int(difference.count_nonzero()),
    }


def measure(folders: Mapping[int, Path], scale: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one scale: samples a second of each method, and its LR against the plain method's and ours.

    Raises:
        RuntimeError: Two methods do not crop alike: their LR could not be compared.
    """
    compared = methods(folders, scale, args.samples, args.batch)
    results = {name: levels(method) for name, method in compared.items() if name != HR_ALONE}
    (plain, gt), (ours, _) = results[PLAIN], results[OURS]
    if not all(torch.equal(gt, other) for _, other in results.values()):
        raise RuntimeError("the methods do not give the same HR crops")

    def work_through(method: Method) -> None:
        for _ in method():
            pass

    calls = {name: functools.partial(work_through, method) for name, method in compared.items()}
    seconds = median_times(calls, args.repeats, warmup=1, device=torch.device("cpu"))
    rows = []
    for name in compared:
        row = {"scale": scale, "method": name, "samples_per_second": args.samples / seconds[name]}
        row["times_plain"] = seconds[PLAIN] / seconds[name]
        if name in results:
            row["from_plain"] = differences_of(results[name][0], plain)
            row["from_ours"] = differences_of(results[name][0], ours)
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table; ratios are to the plain method on compressed records."""
    head = ["scale", "method", "samples a second", "times the plain method"]
    head += ["LR from plain's: largest, mean", "off the border", "LR values that differ from ours"]
    lines = []
    for row in rows:
        cells = [f"×{row['scale']}", row["method"]]
        cells += [f"{row['samples_per_second']:.0f}", f"{row['times_plain']:.1f}"]
        if "from_plain" in row:
            plain, ours = row["from_plain"], row["from_ours"]
            cells += [f"{plain['largest']}, {plain['mean']:.3f}"]
            cells += [
                f"{plain['inner_largest']}, {plain['inner_mean']:.3f}",
                f"{ours['differing']:,} of {ours['values']:,}",
            ]
        else:
            cells += [""] * 3
        lines.append(cells)
    return markdown_table(head, lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw bars of samples a second, a group for each scale."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["method"] for row in rows))
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    figure = Figure(figsize=(9, 4.5))
    axis = figure.subplots()
    for number, name in enumerate(names):
        rates = [row["samples_per_second"] for row in rows if row["method"] == name]
        places = [group + (number - (len(names) - 1) / 2) * 0.13 for group in range(len(scales))]
        bars = axis.bar(places, rates, 0.12, label=name)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(scales)), [f"×{scale}, crops of {LR_PATCH * scale}" for scale in scales])
    axis.set_yscale("log")
    axis.set_ylabel("samples a second, one core")
    axis.margins(y=0.15)
    axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def find_images(folder: Path | None, size: int) -> dict[str, Path | npt.NDArray[np.uint8]]:
    """Find the embedded images, or those of a folder, that have a crop of ``size``.

    Raises:
        UserError: There is none, or one cannot be read.
    """
    if folder is None:
        return {name: load_photograph(name) for name in photograph_names()}
    found = collect_images([folder])
    large = {key: path for key, path in found.items() if min(read_image(path).shape[:2]) >= size}
    if not large:
        raise UserError(f"{folder}: no image is as large as an HR crop, {size}×{size} pixels.")
    return {**large}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--photos", type=Path, help="folder of HR images (default: those that come with scikit-image)"
    )
    parser.add_argument("--scales", type=int, nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--samples", type=int, default=64, help="of a timed pass (default: 64)")
    parser.add_argument("--batch", type=int, default=16, help="samples of a batch (default: 16)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each method (default: 5)")
    parser.add_argument("-o", "--output", type=Path, help="folder for loader.json and loader.png")


def run(args: argparse.Namespace) -> int:
    """Build the LMDBs, measure, print a Markdown table, and write it down where asked."""
    for name in ("samples", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    photos = find_images(args.photos, LR_PATCH * max(args.scales))
    rows: list[dict[str, Any]] = []
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        folders = {
            compression: build_lmdb_sets(
                photos, Path(folder), f"compression{compression}", compression=compression
            )[1]
            for compression in (1, 0)
        }
        images = len(ImageLMDB(folders[0]))
        sizes = {level: (path / "data.mdb").stat().st_size / images for level, path in folders.items()}
        for scale in args.scales:
            rows += measure(folders, scale, args)
        machine = describe_machine(torch.device("cpu"))
    print(markdown(rows))
    print(f"{images} records: {sizes[1]:,.0f} bytes each where compressed, {sizes[0]:,.0f} where stored.")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        settings = {"samples": args.samples, "batch": args.batch, "repeats": args.repeats, "records": images}
        settings |= {"bytes_per_record": {"compressed": sizes[1], "stored": sizes[0]}, "machine": machine}
        mmengine.dump({"settings": settings, "rows": rows}, args.output / "loader.json", indent=1)
        draw(rows, args.output / "loader.png")
    return 0


if __name__ == "__main__":
    sys.exit(
        run_command(
            "compare_loaders",
            sys.argv[1:],
            prog="python docs/studies/compare_loaders.py",
        )
    )
