"""Whether the data that an option file names is there, and enough of it.

Each function gives what it finds wrong as (key within the section, message).
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from esc_basicsr.config.keys import TEMPLATE, is_number, is_whole

Problem = tuple[str, str]

GUIDE = "datasets/README.md says how to get and lay out data; a set that you do without goes out of the file."


def data_problems(dataset: Mapping[str, Any]) -> Iterator[Problem]:
    """Folders and lists of one data set section that are missing, empty or do not belong together."""
    backend = _backend(dataset)
    if backend == "memcached":
        return
    found = True
    for key in ("dataroot_gt", "dataroot_lq"):
        if isinstance(dataset.get(key), str):
            for problem in _root_problems(key, dataset[key], backend):
                found = False
                yield problem
    for index, root, _ in _sources(dataset):
        yield from _lmdb_problems(f"sources[{index}].dataroot_gt", root)
    listing = dataset.get("meta_info_file")
    if isinstance(listing, str) and not Path(listing).is_file():
        found = False
        yield "meta_info_file", f"there is no list of images '{listing}'."
    if found and dataset.get("type") == "PairedImageDataset" and listing is None:
        yield from _pair_problems(dataset, backend)


def count_images(dataset: Mapping[str, Any]) -> int | None:
    """How many images an epoch over a data set section visits; None where that cannot be told."""
    if "sources" in dataset:
        # As DFLIPDataset counts: a weight says how often an epoch visits each image.
        return sum(
            round(_count_lines(_expand(root) / "meta_info.txt") * weight)
            for _, root, weight in _sources(dataset)
        )
    root = dataset.get("dataroot_gt") or dataset.get("dataroot_lq")
    backend = _backend(dataset)
    if not isinstance(root, str) or backend not in ("disk", "lmdb"):
        return None
    if backend == "lmdb":
        return _count_lines(_expand(root) / "meta_info.txt")
    if isinstance(dataset.get("meta_info_file"), str):
        return _count_lines(Path(dataset["meta_info_file"]))
    return len(_image_names(_expand(root)))


def batch_problems(dataset: Mapping[str, Any], opt: Mapping[str, Any]) -> Iterator[Problem]:
    """A training set too small for one batch: BasicSR drops incomplete ones, and would train on nothing."""
    images = count_images(dataset)
    batch, ratio = dataset.get("batch_size_per_gpu"), dataset.get("dataset_enlarge_ratio", 1)
    if not images or not is_whole(batch) or not is_number(ratio):
        return
    processes = _process_count(opt)
    # Without a launcher one process feeds all devices, with a batch that is so much larger.
    devices = _device_count(opt) if processes == 1 else 1
    samples = math.ceil(images * ratio / processes)
    if samples < batch * devices:
        of_each = f" for each of {processes} processes" if processes > 1 else ""
        on_all = f" on each of {devices} GPUs" if devices > 1 else ""
        yield (
            "batch_size_per_gpu",
            f"got {batch}{on_all}, but {images} images × dataset_enlarge_ratio {ratio} make only {samples} "
            f"samples{of_each}, less than one batch, and incomplete batches are dropped: nothing would be "
            "trained on. Lower batch_size_per_gpu or raise dataset_enlarge_ratio.",
        )


def _backend(dataset: Mapping[str, Any]) -> str:
    backend = dataset.get("io_backend")
    kind = backend.get("type") if isinstance(backend, Mapping) else None
    return kind if isinstance(kind, str) else "disk"


def _expand(path: str) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - like BasicSR, no error for an unknown ~user


def _sources(dataset: Mapping[str, Any]) -> Iterator[tuple[int, str, float]]:
    """Place, folder and weight of each LMDB of a DFLIPDataset that is given as it should be."""
    sources = dataset.get("sources")
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        root = source.get("dataroot_gt") if isinstance(source, Mapping) else None
        weight = source.get("weight", 1) if isinstance(source, Mapping) else None
        if isinstance(root, str) and is_number(weight):
            yield index, root, weight


def _root_problems(key: str, root: str, backend: str) -> Iterator[Problem]:
    if backend == "lmdb" and not root.endswith(".lmdb"):
        yield key, f"got '{root}', expected a folder whose name ends in .lmdb (io_backend: type: lmdb)."
    elif backend == "lmdb":
        yield from _lmdb_problems(key, root)
    elif not _expand(root).is_dir():
        yield key, f"there is no folder of images '{root}'."
    elif not _image_names(_expand(root)):
        yield key, f"got '{root}', a folder without files; expected one of images."


def _lmdb_problems(key: str, root: str) -> Iterator[Problem]:
    folder = _expand(root)
    absent = [name for name in ("data.mdb", "meta_info.txt") if not (folder / name).is_file()]
    if not folder.is_dir():
        yield key, f"there is no LMDB folder '{root}'."
    elif absent:
        lacking = " and no ".join(absent)
        yield (
            key,
            f"got '{root}', which has no {lacking}: no complete LMDB of images. Build it anew.",
        )
    elif not _count_lines(folder / "meta_info.txt"):
        yield key, f"got '{root}', whose meta_info.txt lists no image. Build it anew."


def _pair_problems(dataset: Mapping[str, Any], backend: str) -> Iterator[Problem]:
    """Where HR and LR do not match one to one, which BasicSR finds only once all is set up."""
    gt, lq, template = (
        dataset.get("dataroot_gt"),
        dataset.get("dataroot_lq"),
        dataset.get("filename_tmpl", "{}"),
    )
    if not (isinstance(gt, str) and isinstance(lq, str) and TEMPLATE.accepts(template)):
        return
    if backend == "lmdb":
        gt_count, lq_count = (_count_lines(_expand(root) / "meta_info.txt") for root in (gt, lq))
        names = set()
    else:
        gt_names, lq_names = _image_names(_expand(gt)), _image_names(_expand(lq))
        gt_count, lq_count = len(gt_names), len(lq_names)
        names = {(name, template.replace("{}", Path(name).stem) + Path(name).suffix) for name in gt_names}
    if gt_count != lq_count:
        yield (
            "dataroot_lq",
            f"has {lq_count} images, dataroot_gt has {gt_count}; expected one LR for each HR.",
        )
        return
    unmatched = sorted((name, wanted) for name, wanted in names if wanted not in lq_names)
    if unmatched:
        name, wanted = unmatched[0]
        yield (
            "filename_tmpl",
            f"got '{template}', by which the LR image of {name} is '{wanted}'; '{lq}' has no such file. "
            "Expected such as '{}x4' where LR names are HR names with x4 behind.",
        )


def _image_names(folder: Path) -> set[str]:
    """The files that BasicSR takes for images: all that are not hidden."""
    if not folder.is_dir():
        return set()
    return {entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")}


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError:
        return 0


def _process_count(opt: Mapping[str, Any]) -> int:
    """Training processes: as BasicSR counted them, or as torchrun announces them."""
    count = str(opt.get("world_size") or os.environ.get("WORLD_SIZE", "1"))
    return max(1, int(count)) if count.isdecimal() else 1


def _device_count(opt: Mapping[str, Any]) -> int:
    count = opt.get("num_gpu")
    if count == "auto":
        return max(1, torch.cuda.device_count())
    return max(1, count) if is_whole(count) else 1
