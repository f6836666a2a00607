"""Training on HR images alone: LR is made on the fly. For DFLIP and any other mix of LMDBs."""

import itertools
import random
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.data.lmdb_reader import ImageLMDB

__all__ = ["DFLIPDataset"]


class _Source(NamedTuple):
    images: ImageLMDB
    visits: int  # positions in an epoch


class DFLIPDataset(Dataset[dict[str, Any]]):
    """HR images of one or several LMDBs, with LR made by antialiased bicubic reduction to 8 bits.

    DFLIP is DIV2K + Flickr2K + LSDIR + DiverSeg-IP (arXiv:2503.06671, Sec. 4).

    In training an item is a random crop, flipped and turned, and its reduction. In the phases val and test it
    is a whole image, cut to a multiple of the scale, and its reduction; every image comes once, whatever its
    source's weight. Random numbers come from Python's ``random``, which BasicSR seeds in each worker.

    Args:
        opt: BasicSR's options of a data set, as `check_options` lets them pass:

            * ``name``, ``type``, and the keys of BasicSR's loader;
            * ``sources``: list of ``{dataroot_gt: folder.lmdb, weight: 1}``. ``weight`` is how often an epoch
              visits each image of the source; any number above 0, 1 by default. With 0.5 an epoch visits one
              image of each successive two, drawn anew each time;
            * ``gt_size``: side of an HR crop, a multiple of the scale (training only);
            * ``use_hflip``: flip left and right; ``use_rot``: flip up and down and transpose (training only);
            * ``lq_on_device``: leave LR to the model, which makes it for a batch at a time on its device
              (`ESCModel`); false by default;
            * ``scale`` and ``phase``, which BasicSR puts in.

    Returns of an item:
        ``gt``: (3, H, W) and ``lq``: (3, H / scale, W / scale), float32 RGB in [0, 1];
        ``gt_path`` and ``lq_path``: ``<dataroot_gt>/<key>``.
        With ``lq_on_device`` there is no ``lq``, and ``gt`` is (3, H, W), uint8 RGB: a quarter of the bytes.

    Raises:
        UserError: An LMDB that is missing or broken; an image smaller than ``gt_size``, or in training of
            another size than meta_info.txt states, named with its source; a weight that visits none.
    """

    def __init__(self, opt: Mapping[str, Any]) -> None:
        self.opt = opt
        self._label = f"data set {opt.get('name', 'without a name')!r}"
        self._scale: int = opt["scale"]
        self._training = opt["phase"] == "train"
        self._lq_on_device = opt.get("lq_on_device", False)
        if self._training:
            self._gt_size: int = opt["gt_size"]
            self._use_hflip, self._use_rot = opt["use_hflip"], opt["use_rot"]
        self._sources = [self._open(number, source) for number, source in enumerate(opt["sources"])]
        self._ends = list(itertools.accumulate(source.visits for source in self._sources))

    def _open(self, number: int, source: Mapping[str, Any]) -> _Source:
        images, weight = self._images(source["dataroot_gt"]), source.get("weight", 1)
        if not self._training:
            return _Source(images, len(images))
        small = np.flatnonzero(images.sizes.min(axis=1) < self._gt_size)
        if len(small):
            height, width = images.sizes[small[0]]
            raise UserError(
                f"{self._label}: image {images.keys[small[0]]!r} of {images.path} is {width}x{height}, "
                f"smaller than gt_size {self._gt_size} ({len(small)} such in all): take its line out of "
                f"{images.path / 'meta_info.txt'}, or lower gt_size"
            )
        visits = round(len(images) * weight)
        if visits < 1:
            raise UserError(
                f"{self._label}: sources[{number}]: with weight {weight} none of its {len(images)} images is "
                "visited; raise it"
            )
        return _Source(images, visits)

    def _images(self, root: str) -> Any:
        """Open a source."""
        return ImageLMDB(root)

    def _pair(self, hr: Tensor) -> dict[str, Tensor]:
        """Make LR and HR of an HR image, (3, H, W), uint8."""
        return make_pair(hr, self._scale)

    def __len__(self) -> int:
        """Return the items of an epoch: the sum over the sources of round(images * weight)."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a crop of one image, augment and reduce it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self._label}: index {index} is not below its length {len(self)}")
        number = bisect_right(self._ends, index)
        source = self._sources[number]
        position = index - self._ends[number] + source.visits
        chosen = _stratified(position, source.visits, len(source.images))
        if self._training:
            image = self._augment(self._read_crop(source.images, chosen))
        else:
            image = source.images.read(chosen)
            height, width = (side - side % self._scale for side in image.shape[:2])
            image = image[:height, :width]
        # one copy: out of OpenCV's order, the augmentation's views included
        hr = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))
        path = str(source.images.path / source.images.keys[chosen])
        images = {"gt": hr} if self._lq_on_device else self._pair(hr)
        return {**images, "lq_path": path, "gt_path": path}

    def _read_crop(self, images: ImageLMDB, index: int) -> npt.NDArray[np.uint8]:
        height, width = images.sizes[index].tolist()
        top = random.randint(0, height - self._gt_size)
        left = random.randint(0, width - self._gt_size)
        return images.read_crop(index, top, left, self._gt_size, self._gt_size)

    def _augment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self._use_hflip and random.random() < 0.5:
            image = image[:, ::-1]
        if self._use_rot and random.random() < 0.5:
            image = image[::-1]
        if self._use_rot and random.random() < 0.5:
            image = image.transpose(1, 0, 2)
        return image


def _stratified(position: int, visits: int, images: int) -> int:
    """Draw the image for one of ``visits`` positions from the position's own stretch of the images."""
    if visits == images:
        return position
    return min(int((position + random.random()) * images / visits), images - 1)
