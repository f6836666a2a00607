"""Training and testing without a change of size: noise or JPEG artefacts are made on the fly."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esc_basicsr.data.dflip_dataset import DFLIPDataset
from esc_basicsr.data.image_folder import find_images, read_image

__all__ = ["DegradedDataset"]


class _Folder:
    """The images of a folder, with what `DFLIPDataset` reads of an LMDB to test on.

    Raises:
        UserError: There is no such folder, or no image in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = [str(name) for name in find_images(path, recursive=False)]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        return read_image(self.path / self.keys[index])


class DegradedDataset(DFLIPDataset):
    """HR images of LMDBs, and the same with noise or JPEG artefacts as LR, of scale 1.

    Noise is Gaussian, of one standard deviation for all pixels and channels, neither rounded nor clipped.
    JPEG is OpenCV's, with its chroma at half resolution. In the phases val and test an image's noise is
    always the same: NumPy's, from seed 0, of the image in OpenCV's order, as SwinIR's authors measure
    (arXiv:2108.10257). In training it comes from NumPy's global random numbers.

    Args:
        opt: `DFLIPDataset`'s options, without ``lq_on_device``; in the phases val and test a source may be a
            folder of images. One of these is given:

            * ``noise_sigma``: standard deviation of the noise, of 255;
            * ``jpeg_quality``: a quality; in training also the least and the largest of those that are drawn
              from evenly.

            ``color: y`` makes gray images of all: MATLAB's luma, rounded, of 16 to 235. In the phases val and
            test gray images stay as they are; in training they become luma, too, as crops of a coloured
            image do that have no colour.

    Returns of an item:
        ``gt`` and ``lq``: (3, H, W), float32 RGB, or (1, H, W); ``gt`` in [0, 1], ``lq`` beyond where noise
        leads there.
        ``gt_path`` and ``lq_path``: ``<dataroot_gt>/<key>``.

    Raises:
        UserError: As `DFLIPDataset`; a folder that does not exist or has no images.
    """

    def __init__(self, opt: Mapping[str, Any]) -> None:
        super().__init__(opt)
        self._sigma: float = opt.get("noise_sigma") or 0
        quality = opt.get("jpeg_quality")
        self._qualities = [quality, quality] if isinstance(quality, int) else quality
        self._is_gray = opt.get("color") == "y"

    def _images(self, root: str) -> Any:
        is_folder = not self._training and not root.endswith(".lmdb")
        return _Folder(Path(root).expanduser()) if is_folder else super()._images(root)

    def _pair(self, hr: Tensor) -> dict[str, Tensor]:
        image: Any = np.ascontiguousarray(hr.permute(1, 2, 0).numpy()[:, :, ::-1])  # in OpenCV's order
        if self._is_gray:
            from basicsr.utils import bgr2ycbcr  # whose import imports this module

            is_gray = not self._training and (image == image[:, :, :1]).all()
            image = image[:, :, 0] if is_gray else bgr2ycbcr(image, y_only=True)
        gt = _planes(image).float().div_(255)
        if self._qualities is not None:
            quality = random.randint(*self._qualities)
            _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            decoded: Any = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
            return {"lq": _planes(decoded).float().div_(255), "gt": gt}
        # NumPy's global generator is a RandomState, too
        generator = np.random if self._training else np.random.RandomState(0)
        noise = generator.normal(0, self._sigma / 255, image.shape)
        return {"lq": gt + _planes(noise).float(), "gt": gt}


def _planes(image: npt.NDArray[Any]) -> Tensor:
    """Turn an image in OpenCV's order, (H, W, 3) or (H, W), into (3, H, W), RGB, or (1, H, W)."""
    rgb = image.reshape(*image.shape[:2], -1)[:, :, ::-1]
    return torch.from_numpy(rgb.transpose(2, 0, 1).copy())
