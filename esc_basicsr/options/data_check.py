"""Checking that the data that an option file names exists, and is enough.

Each function gives what it finds wrong as (key within the section, message).
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import is_file, is_folder
from esc_basicsr.data.image_pairs import image_names, pair_folders, stray_names
from esc_basicsr.data.meta_info import Keys, read_meta_info
from esc_basicsr.options.kinds import TEMPLATE, is_whole
from esc_basicsr.options.schema import LOADER, SOURCE

Problem = tuple[str, str]
Size = tuple[int, int]  # height, width
Sizes = npt.NDArray[np.integer[Any]]  # (images, 2)

GUIDE = "datasets/README.md says how to get and lay out data; a set that you do without goes out of the file."

_LISTED = 5
_PAIRS_LOOKED_AT = 32  # of a folder, whose every image is a file to open
_NIQE_BLOCK = 96  # pixels, whose statistics BasicSR's NIQE takes
# Types whose list of images BasicSR ignores where they lie in an LMDB.
_UNLISTED_IN_LMDB = {
    "PairedImageDataset",
    "SingleImageDataset",
    "RealESRGANDataset",
    "RealESRGANPairedDataset",
}
_LONGEST_SIDE = 10**9  # pixels


def data_problems(dataset: Mapping[str, Any], scale: Any, is_training_set: bool) -> Iterator[Problem]:
    """Find folders and lists of one data set section that are missing, empty or do not belong together.

    ``is_training_set``: crops of ``gt_size`` are taken from it.
    """
    backend = _backend(dataset)
    if backend == "memcached":
        return
    roots = [key for key in ("dataroot_gt", "dataroot_lq") if isinstance(dataset.get(key), str)]
    problems = [problem for key in roots for problem in _root_problems(key, dataset[key], backend)]
    for key, listing in _listings(dataset):
        if not (is_file(listing) and os.access(listing, os.R_OK)):
            problems.append((key, f"there is no list of images '{listing}'."))
        elif backend == "lmdb" and dataset.get("type") in _UNLISTED_IN_LMDB:
            problem = "nothing reads it with io_backend lmdb: an LMDB's meta_info.txt says what is taken."
            problems.append((key, problem))
    yield from problems
    is_pairs = dataset.get("type") == "PairedImageDataset" and len(roots) == 2
    if is_pairs and not problems and not _listings(dataset):
        yield from _pair_problems(dataset, backend, scale, is_training_set)
    for index, root, _ in _sources(dataset):
        key = f"sources[{index}].dataroot_gt"
        if _is_tested_folder(dataset, root, is_training_set):
            yield from _root_problems(key, root, "disk")
            continue
        problems = [*_lmdb_problems(key, root)]
        yield from problems
        if not problems and is_training_set:
            yield from _crop_problems(root, *_listed(root), dataset.get("gt_size"))


def count_images(dataset: Mapping[str, Any]) -> int | None:
    """Count the images that an epoch over a data set section visits; None where that cannot be known."""
    if "sources" in dataset:
        # As DFLIPDataset counts: a weight says how often an epoch visits each image.
        return sum(round(_count_listed(root) * weight) for _, root, weight in _sources(dataset))
    root = dataset.get("dataroot_gt") or dataset.get("dataroot_lq")
    backend = _backend(dataset)
    if not isinstance(root, str) or backend not in ("disk", "lmdb"):
        return None
    if backend == "lmdb":
        return _count_listed(root)
    for _, listing in _listings(dataset):
        return sum(1 for line in Path(listing).read_bytes().splitlines() if line.strip())
    return len(image_names(expand(root))) if is_folder(expand(root)) else 0


def batch_problems(dataset: Mapping[str, Any], opt: Mapping[str, Any]) -> Iterator[Problem]:
    """Find a batch that processes cannot share, or that a training set is too small for."""
    images = count_images(dataset)
    key = "batch_size_per_gpu" if dataset.get("global_batch_size") is None else "global_batch_size"
    batch: Any = dataset.get(key)
    ratio: Any = dataset.get("dataset_enlarge_ratio", 1)
    kinds = {key: batch, "dataset_enlarge_ratio": ratio}
    if not images or not all(LOADER[name].kind.accepts(value) for name, value in kinds.items()):
        return
    processes, of_each, needed = process_count(opt), "", batch
    if key == "global_batch_size" and batch % processes:
        yield key, f"got {batch}, expected a multiple of the number of processes, {processes}."
        return
    if key == "batch_size_per_gpu":
        # Without a launcher one process feeds all devices, with a batch that is so much larger.
        devices = _device_count(opt) if processes == 1 else processes
        of_each = f" on each of {devices} GPUs or processes" if devices > 1 else ""
        needed = batch * devices
    samples = math.ceil(images * ratio)
    if samples < needed:
        yield (
            key,
            f"got {batch}{of_each}, but {images} images × dataset_enlarge_ratio {ratio} make only {samples} "
            "samples an epoch, less than one batch, and incomplete batches are dropped: nothing would be "
            "trained on. Lower it or raise dataset_enlarge_ratio.",
        )


def result_problems(
    dataset: Mapping[str, Any], scale: Any, saves_images: bool, niqe_border: int | None
) -> Iterator[Problem]:
    """Find what ends or spoils validation on data that exists: equal names, images too small for NIQE.

    Results are saved under the names of the LR images, if they are. ``niqe_border``: what NIQE crops on each
    side of a result; None if it is not measured.
    """
    root, backend = dataset.get("dataroot_lq"), _backend(dataset)
    if not isinstance(root, str) or backend == "memcached":
        return
    names = _listed(root)[0] if backend == "lmdb" else image_names(expand(root))
    first: dict[str, str] = {}
    for name in names if saves_images and backend == "disk" else ():
        if (other := first.setdefault(Path(name).stem, name)) != name:
            message = (
                f"results of '{other}' and '{name}' of '{root}' would have one name. Rename one of them."
            )
            yield "dataroot_lq", message
            break
    if niqe_border is None or not is_whole(scale):
        return
    try:
        sizes = _listed(root)[1] if backend == "lmdb" else (_file_size(expand(root) / name) for name in names)
        for name, size in zip(names, sizes, strict=True):
            if min(size) * scale - 2 * niqe_border < _NIQE_BLOCK:
                height, width = (int(side) * scale for side in size)
                yield (
                    "dataroot_lq",
                    f"the result of '{name}' of '{root}' is {_say_size((height, width))}, and calculate_niqe "
                    f"needs {_NIQE_BLOCK} pixels a side within crop_border. Leave out this metric or set.",
                )
                break
    except UserError as error:
        yield "dataroot_lq", str(error)


def _backend(dataset: Mapping[str, Any]) -> str:
    backend = dataset.get("io_backend")
    kind = backend.get("type") if isinstance(backend, Mapping) else None
    return kind if isinstance(kind, str) else "disk"


def expand(path: str) -> Path:
    """Write out a ~ at the beginning of ``path``; left as it is where that is unknown."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - like BasicSR, no error for an unknown ~user


def _sources(dataset: Mapping[str, Any]) -> Iterator[tuple[int, str, float]]:
    """Give index, folder and weight of each LMDB of a DFLIPDataset that is given as it should be."""
    sources = dataset.get("sources")
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        root = source.get("dataroot_gt") if isinstance(source, Mapping) else None
        weight: Any = source.get("weight", 1) if isinstance(source, Mapping) else None
        if isinstance(root, str) and SOURCE["weight"].kind.accepts(weight):
            yield index, root, weight


def _listings(dataset: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give key and file of a list of a data set's images, where it has one."""
    keys = ("meta_info_file", "meta_info")  # the latter is Real-ESRGAN's
    return [(key, dataset[key]) for key in keys if isinstance(dataset.get(key), str)]


def _is_tested_folder(dataset: Mapping[str, Any], root: str, is_training_set: bool) -> bool:
    return dataset.get("type") == "DegradedDataset" and not is_training_set and not root.endswith(".lmdb")


def _root_problems(key: str, root: str, backend: str) -> Iterator[Problem]:
    if backend == "lmdb" and not root.endswith(".lmdb"):
        yield key, f"got '{root}', expected a folder whose name ends in .lmdb (io_backend: type: lmdb)."
    elif backend == "lmdb":
        yield from _lmdb_problems(key, root)
    elif not is_folder(expand(root)):
        yield key, f"there is no folder of images '{root}'."
    elif not image_names(expand(root)):
        strays = ", ".join(stray_names(expand(root))[:_LISTED])
        what = f" of other files ({strays})" if strays else " without files"
        yield key, f"got '{root}', a folder{what}; expected one of images."


def _lmdb_problems(key: str, root: str) -> Iterator[Problem]:
    folder = expand(root)
    absent = [name for name in ("data.mdb", "meta_info.txt") if not is_file(folder / name)]
    if not is_folder(folder):
        yield key, f"there is no LMDB folder '{root}'."
    elif absent:
        lacking = " and no ".join(absent)
        yield key, f"got '{root}', which has no {lacking}: no complete LMDB of images. Build it anew."
    else:
        try:
            _listed(root)
        except UserError as error:
            yield key, f"{error}."


def _pair_problems(
    dataset: Mapping[str, Any], backend: str, scale: Any, is_training_set: bool
) -> Iterator[Problem]:
    """Find where HR and LR do not belong together one to one, which BasicSR notices late or never."""
    gt, lq, template = dataset["dataroot_gt"], dataset["dataroot_lq"], dataset.get("filename_tmpl", "{}")
    names: Sequence[str]
    if backend == "lmdb":
        names, sizes = _listed(gt)
        lq_names, lq_sizes = _listed(lq)
        if names != lq_names:  # as they are for sets that were made together
            if unmatched := sorted({*names} - {*lq_names}):
                yield (
                    "dataroot_lq",
                    f"got '{lq}', which has no '{unmatched[0]}' as dataroot_gt has ({len(unmatched)} of "
                    f"{len(names)} such in all); expected the LR images of these HR images.",
                )
                return
            if alone := sorted({*lq_names} - {*names}):
                yield (
                    "dataroot_lq",
                    f"got '{lq}', whose '{alone[0]}' has no HR image in dataroot_gt ({len(alone)} of "
                    f"{len(lq_names)} such in all); expected one LR for each HR.",
                )
                return
            position_of = {name: position for position, name in enumerate(lq_names)}
            lq_sizes = lq_sizes[[position_of[name] for name in names]]
    elif TEMPLATE.accepts(template):
        try:
            lq_of = pair_folders(expand(gt), expand(lq), template)
        except UserError as error:
            yield "dataroot_lq", str(error)
            return
        names = [*lq_of][:_PAIRS_LOOKED_AT]
        try:
            sizes = np.array([_file_size(expand(gt) / name) for name in names])
            lq_sizes = np.array([_file_size(expand(lq) / lq_of[name]) for name in names])
        except UserError as error:
            yield "dataroot_gt" if f"'{expand(gt)}/" in str(error) else "dataroot_lq", str(error)
            return
    else:
        return
    yield from _scale_problems(names, sizes, lq_sizes, scale, is_training_set)
    if is_training_set:
        yield from _crop_problems(gt, names, sizes, dataset.get("gt_size"))


def _scale_problems(
    names: Sequence[str], sizes: Sizes, lq_sizes: Sizes, scale: Any, is_training_set: bool
) -> Iterator[Problem]:
    """Find pairs, by name with the sizes of HR and LR, whose HR image is not ``scale`` times the LR image.

    To validate or test by, BasicSR crops HR images to that, however much there is to crop; right is less than
    ``scale`` pixels, where the LR size was rounded down.
    """
    if not (is_whole(scale) and scale >= 1):
        return
    surplus = 0 if is_training_set else scale - 1
    # No side has so many pixels: more would be as wrong, but overflow.
    rest = sizes - lq_sizes.astype(np.int64) * int(min(scale, _LONGEST_SIDE))
    (wrong,) = np.nonzero(((rest < 0) | (rest > surplus)).any(axis=1))
    if len(wrong):
        first = wrong[0]
        height, width = lq_sizes[first].tolist()
        expected = _say_size((height * scale, width * scale))
        more = f", or up to {surplus} more on a side" if surplus else ""
        yield (
            "dataroot_lq",
            f"at scale {scale} the LR image of '{names[first]}', {_say_size((height, width))}, goes with an "
            f"HR image of {expected}{more}; got {_say_size(sizes[first].tolist())} ({len(wrong)} of "
            f"{len(names)} pairs do not fit). Give HR and LR of this scale.",
        )


def _crop_problems(root: str, names: Sequence[str], sizes: Sizes, gt_size: Any) -> Iterator[Problem]:
    if not is_whole(gt_size):
        return
    (small,) = np.nonzero(sizes.min(axis=1) < gt_size)
    if len(small):
        first = small[0]
        yield (
            "gt_size",
            f"got {gt_size}, but '{names[first]}' of '{root}' is {_say_size(sizes[first].tolist())} "
            f"({len(small)} of {len(names)} images are smaller than a crop). Lower gt_size, or take them "
            "out.",
        )


def _listed(root: str) -> tuple[Keys, Sizes]:
    """Read names and sizes of an LMDB's images. Raises UserError if they cannot be read."""
    return read_meta_info(expand(root) / "meta_info.txt")


def _count_listed(root: str) -> int:
    """Count the images of an LMDB; 0 where its list cannot be read, which is reported elsewhere."""
    try:
        return len(_listed(root)[0])
    except UserError:
        return 0


def _file_size(file: Path) -> Size:
    """Read height and width from the file's header. Raises UserError if it is no image."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            # 5 and above turn the image by a quarter, as OpenCV does on reading; a PNG is decoded to be asked
            is_photo = image.format in ("JPEG", "MPO")
            is_turned = is_photo and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"'{file}' cannot be read as an image. Replace or remove it.") from None
    return (width, height) if is_turned else (height, width)


def _say_size(size: Sequence[int]) -> str:
    return f"{size[1]}×{size[0]}"


def process_count(opt: Mapping[str, Any]) -> int:
    """Count training processes: as BasicSR counted them, or as torchrun announces them."""
    count = str(opt.get("world_size") or os.environ.get("WORLD_SIZE", "1"))
    return max(1, int(count)) if count.isdecimal() else 1


def _device_count(opt: Mapping[str, Any]) -> int:
    count = torch.cuda.device_count() if opt.get("num_gpu") == "auto" else opt.get("num_gpu")
    return max(1, count) if is_whole(count) else 1
