"""Upscaling arrays and tensors of any size, in the memory that is available."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esc_basicsr import fast
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import info_once, logger, warn_once
from esc_basicsr.common.memory import available_memory, is_out_of_memory
from esc_basicsr.fast.precision import PRECISIONS
from esc_basicsr.fast.tiles import grid_of, least_pixels, run_in_tiles, tile_side
from esc_basicsr.weights.shipped import default_model, load_network

Images = TypeVar("Images", Tensor, npt.NDArray[Any])

_FLOATS = ("float16", "float32", "float64")  # of which PyTorch makes tensors
_LEVELS = {torch.uint8: 255, torch.uint16: 65535}

# Feature maps in float32 that are held at once, by row chunks (docs/speed.md measures 4.6), and some more.
_MAPS = 6
_SHARE = 0.8  # of the memory that is available
# A trial image in half precision must come this close to float32: a tenth of an 8-bit level on average.
_HALF_IS_SAFE = 68.0  # dB
_LEAST_SPREAD = 4.0  # standard deviation of a trial image in 8-bit levels: on black any precision is safe
_TRIAL_SIDE = {"cpu": 64, "cuda": 128}  # on a CPU a larger one would take longer than small images do
# Pixels that are mirrored around an image: convolutions take what lies beyond an edge for black. More of
# them gain nothing (docs/upscale.md).
BORDER = 4
_MOST_OF_FLOAT = 1.5  # floats in [0, 1] may overshoot a little; those in [0, 255] are a mistake

# Converts a part of the result, (N, 3, H, W) in [0, 1], to the type in which it is kept.
Finish = Callable[[Tensor], Tensor]


class Upscaler:
    """A trained ESC network, to be called on images.

    >>> upscale = Upscaler("ESC_x4.pth")
    >>> sr = upscale(image)

    Images of any size are worked through in row chunks inside each layer, which gives what the network
    gives and needs a few feature maps (`esc_basicsr.fast.row_chunks`). What is too large even for that is cut
    into tiles that lie on the grid of the network's windows; the log says so. Beyond its edges an image goes
    on as its mirror image.

    Args:
        model: A checkpoint file (.pth or .safetensors, of the release or of this package), or the name of a
            network that ships; the default one of ``scale`` if left out.
        scale: Upscaling factor that is wanted; the network's if left out.
        device: ``auto``, a GPU where there is one; ``cpu``; ``cuda``, ``cuda:1`` ...
        precision: ``fp32``; ``fp16`` or ``bf16``, to compute in it where autocast deems that safe;
            ``auto``: fp16 on a GPU, bf16 on a CPU with instructions for it, for 8-bit images if a part of
            the first one that is not flat comes out the same; else fp32.
        memory: Bytes to work in, beside a result that is put together from tiles; by default what is
            available.
        ensemble: Average the results of all eight flips and turns of an image (self-ensemble), which takes
            eight times as long (docs/upscale.md states the gain).

    Attributes:
        bytes_per_pixel: Memory that a pixel of LR takes in one piece.

    Raises:
        UserError: The model, its scale or the device is not available; or fp16 or bf16 would be slower than
            fp32, as fp16 is on any CPU.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        scale: int | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        memory: int | None = None,
        ensemble: bool = False,
    ) -> None:
        trained = load_network(default_model(scale) if model is None else model)
        if scale not in (None, trained.scale):
            raise UserError(f"{trained.name} is a network of scale ×{trained.scale}, not ×{scale}.")
        if precision != "auto" and precision not in PRECISIONS:
            raise UserError(f"precision must be auto or one of {', '.join(PRECISIONS)}, got {precision!r}.")
        channels = {trained.options.get(key, 3) for key in ("in_channels", "out_channels")}
        if channels != {3}:
            raise UserError(f"{trained.name} is no network for RGB: run it by esc_basicsr.fast.prepare.")
        self.scale = trained.scale
        self.name = trained.name
        self.variant = trained.variant
        self.device = _device(device)
        self.precision = precision
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("float16 would be slower than float32 on a CPU: choose auto, fp32 or bf16.")
        if precision == "bf16" and self.device.type == "cpu":
            fast.require_bf16()
        self._network = _prepare(trained.network.to(self.device), self.device)
        self._window = grid_of(trained.network, trained.options)
        self._memory = memory
        self.ensemble = ensemble
        values = _MAPS * trained.options["dim"] + 3 * 3 * self.scale**2
        self.bytes_per_pixel = 4 * values
        self._most_pixels: int | None = None  # that went well, since the memory was not enough for more
        self._half: torch.dtype | None = None if precision == "auto" else PRECISIONS[precision]

    @property
    def chosen_half(self) -> str | None:
        """Return what ``auto`` has chosen for 8-bit images; None for fp32, or before a trial."""
        names = (name for name, dtype in PRECISIONS.items() if dtype == self._half != torch.float32)
        return next(names, None) if self.precision == "auto" else None

    def __call__(self, images: Images) -> Images:
        """Upscale one image, or a batch of images of one size.

        Args:
            images: An array of uint8 or uint16, or of floats in [0, 1]: (H, W) gray, (H, W, 3) RGB, or a
                batch (N, H, W, 3). Or a tensor of floats in [0, 1]: (3, H, W) or (N, 3, H, W), RGB, on any
                device.

        Returns:
            The same kind, type, layout and device, sides ``scale`` times as long; floats in [0, 1].

        Raises:
            UserError: Another shape or type; or the memory is not enough for the result, or for even the
                smallest tile.
        """
        if isinstance(images, Tensor):
            if not images.is_floating_point() or images.ndim not in (3, 4) or images.shape[-3] != 3:
                raise UserError(
                    "expected a tensor of floats in [0, 1] of the shape (3, H, W) or (N, 3, H, W), got "
                    f"{images.dtype} {tuple(images.shape)}."
                )
            _check_range(images)
            batch = images if images.ndim == 4 else images[None]
            out = self._upscale(batch.float(), lambda sr: sr.to(images.dtype)).to(images.device)
            return out if images.ndim == 4 else out[0]
        if not isinstance(images, np.ndarray):
            raise UserError(f"expected an array or a tensor, got {type(images).__name__}.")
        return self._upscale_array(images)

    def _upscale_array(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        images = images.astype(images.dtype.newbyteorder("="), copy=False)
        levels = {"uint8": 255, "uint16": 65535}.get(images.dtype.name, 1)
        is_float = images.dtype.name in _FLOATS
        is_gray = images.ndim == 2
        if not (levels > 1 or is_float) or not (is_gray or (images.ndim in (3, 4) and images.shape[-1] == 3)):
            raise UserError(
                "expected an array of uint8, uint16 or floats (16 to 64 bits) in [0, 1] of the shape (H, W), "
                f"(H, W, 3) or (N, H, W, 3), got {images.dtype} {images.shape}."
            )
        values = torch.from_numpy(np.require(images[..., None] if is_gray else images, None, ["C", "W"]))
        if is_float:
            _check_range(values)
        batch = (values if values.ndim == 4 else values[None]).permute(0, 3, 1, 2)

        def finish(sr: Tensor) -> Tensor:
            values = sr.mean(1, keepdim=True) if is_gray else sr
            return (values.mul_(levels).round_() if levels > 1 else values).cpu().to(batch.dtype)

        out = self._upscale(batch, finish).permute(0, 2, 3, 1)
        result: npt.NDArray[Any] = (out if images.ndim == 4 else out[0]).numpy()
        return result[..., 0] if is_gray else result

    def _upscale(self, batch: Tensor, finish: Finish) -> Tensor:
        """Upscale (N, 1 or 3, H, W); the result is where the network is, or on the CPU.

        The batch stays of its own type: as floats in [0, 1] a large image takes four times the memory.
        """
        if 0 in batch.shape:
            raise UserError(f"expected images of at least one pixel, got {tuple(batch.shape)}.")
        if self.ensemble:
            return finish(self._mean_of_turns(mirrored(batch).expand(-1, 3, -1, -1)))
        return self._without_border(self._upscale_bordered(mirrored(batch).expand(-1, 3, -1, -1), finish))

    def _mean_of_turns(self, batch: Tensor) -> Tensor:
        """Average what the flips and turns of a batch become, flipped and turned back; floats, on the CPU."""
        total: Tensor | None = None
        for is_transposed in (False, True):
            for axes in ((), (2,), (3,), (2, 3)):
                part = flipped(batch, axes)
                sr = self._upscale_bordered(part.transpose(2, 3) if is_transposed else part, Tensor.cpu)
                sr = self._without_border(flipped(sr.transpose(2, 3) if is_transposed else sr, axes))
                total = sr.clone() if total is None else total.add_(sr)
        assert total is not None
        return total.div_(8)

    def _without_border(self, sr: Tensor) -> Tensor:
        edge = BORDER * self.scale
        return sr[:, :, edge:-edge, edge:-edge]

    def _upscale_bordered(self, batch: Tensor, finish: Finish) -> Tensor:
        *_, height, width = batch.shape
        while True:
            at_once = self._pixels_at_once()
            try:
                is_free = batch.dtype == torch.uint8 or self.precision != "auto"
                dtype = self._choose_precision(batch) if is_free else torch.float32
                if len(batch) * height * width <= at_once:
                    return finish(self._run(batch, dtype))
                if len(batch) > 1:
                    return torch.cat([self._upscale_bordered(image[None], finish).cpu() for image in batch])
                return self._run_tiles(batch, dtype, finish)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._go_smaller(min(at_once, batch.numel() // 3), error)

    def _run(self, batch: Tensor, dtype: torch.dtype) -> Tensor:
        half = dtype != torch.float32
        values = batch.to(self.device).float() / _LEVELS.get(batch.dtype, 1)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype if half else None, enabled=half),
        ):
            return self._network(values).float().clamp_(0, 1)

    def _run_tiles(self, image: Tensor, dtype: torch.dtype, finish: Finish) -> Tensor:
        """Upscale one image, tile by tile. The result is on the CPU: a GPU may have no room for it."""
        *_, height, width = image.shape
        pixel = finish(torch.zeros(1, 3, 1, 1))
        size = height * width * self.scale**2 * pixel.numel() * pixel.element_size()
        available = available_memory(torch.device("cpu"))
        image_height, image_width = (side - 2 * BORDER for side in (height, width))
        if size > available:
            raise UserError(
                f"a result of {image_width * self.scale} × {image_height * self.scale} pixels takes "
                f"{size / 2**30:,.1f} GiB of memory, and {available / 2**30:,.1f} are available: cut the "
                "image into parts, or close other programs."
            )
        side = tile_side(self._pixels_at_once(beside=size), self._window)
        logger.warning(
            "%d × %d pixels are too many for the memory: they are worked through in tiles of %d × %d, which "
            "differs a little from the whole (docs/upscale.md).",
            *(image_width, image_height, side, side),
        )
        return run_in_tiles(
            lambda part: finish(self._run(part, dtype)), image, self.scale, side, self._window
        )

    def _pixels_at_once(self, beside: int = 0) -> int:
        """Return how many LR pixels fit into the memory, beside so many bytes of the CPU's."""
        memory: float
        if self._memory is not None:
            memory = self._memory
        else:
            memory = available_memory(self.device) * _SHARE - (beside if self.device.type == "cpu" else 0)
        least = least_pixels(self._window)
        pixels = int(memory / self.bytes_per_pixel)
        if pixels < least:
            needed = least * self.bytes_per_pixel / 2**20
            warn_once(f"The memory to work in is less than {self.name} needs: it takes {needed:,.0f} MiB.")
            pixels = least
        return pixels if self._most_pixels is None else min(pixels, self._most_pixels)

    def _go_smaller(self, pixels: int, error: Exception) -> None:
        """Halve the pixels at once: another program has taken memory, or the estimate was too low."""
        least = least_pixels(self._window)
        if pixels <= least:
            raise UserError(
                f"There is not enough memory for {least:,} pixels at a time, the least that can be worked "
                "on: close other programs, or choose another device."
            ) from error
        self._most_pixels = max(pixels // 2, least)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _choose_precision(self, batch: Tensor) -> torch.dtype:
        """Choose what to compute in, tried out on a part of the first image that shows something."""
        if self._half is None:
            name = _half_of(self.device)
            if name is None:
                self._half = torch.float32
                return self._half
            side = _TRIAL_SIDE[self.device.type]
            rows, columns = (_middle(length, side) for length in batch.shape[2:])
            part = batch[:1, :, rows, columns]
            if part.float().std(correction=0) < _LEAST_SPREAD:
                return torch.float32
            self._half = self._half_if_it_is_safe(part, name)
        return self._half

    def _half_if_it_is_safe(self, part: Tensor, name: str) -> torch.dtype:
        exact, half = (self._run(part, dtype) for dtype in (torch.float32, PRECISIONS[name]))
        psnr = float(-10 * torch.log10((exact - half).square().mean()))  # inf if they are equal, else finite
        if psnr >= _HALF_IS_SAFE:
            return PRECISIONS[name]
        info_once(f"{name} differs from fp32 ({psnr:.1f} dB): {self.name} runs in fp32.")
        return torch.float32


def mirrored(images: Tensor) -> Tensor:
    """Mirror images at their edges by `BORDER` pixels, the outermost ones twice, at whatever size.

    As LR is made of HR, whose mirror image MATLAB's bicubic reads beyond the edges.

    Shape:
        Input: (N, C, H, W), any H, W >= 1. Output: (N, C, H + 2·BORDER, W + 2·BORDER).
    """
    for axis in (2, 3):
        size = images.shape[axis]
        index = torch.arange(-BORDER, size + BORDER, device=images.device) % (2 * size)
        images = images.index_select(axis, torch.minimum(index, 2 * size - 1 - index))
    return images


def flipped(images: Tensor, axes: Sequence[int]) -> Tensor:
    """Flip images along axes; by index, as PyTorch flips no uint16."""
    for axis in axes:
        images = images.index_select(axis, torch.arange(images.shape[axis] - 1, -1, -1, device=images.device))
    return images


def _check_range(values: Tensor) -> None:
    """Refuse floats that are not in [0, 1], such as those in [0, 255]."""
    if values.numel() and not (values.abs().max() <= _MOST_OF_FLOAT):  # not a number is not, either
        raise UserError(
            f"expected floats in [0, 1], got values from {float(values.min()):.4g} to "
            f"{float(values.max()):.4g}: divide them by 255, or by what is white."
        )


def _middle(length: int, most: int) -> slice:
    """Return the middle part of a side: images have more there than in their corners."""
    first = max(0, length - most) // 2
    return slice(first, first + most)


def _half_of(device: torch.device) -> str | None:
    """Find the half precision in which a device is faster than in float32."""
    if device.type == "cuda":
        return "fp16"
    try:
        fast.require_bf16()
    except UserError:  # which says why; float32 is what is left
        return None
    return "bf16"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built with CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {name!r} is not available ({reason}): choose auto, cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}: expected auto, cpu or cuda.")
    return device


def _prepare(network: nn.Module, device: torch.device) -> nn.Module:
    """Make a network fast, by C++ kernels too where they can be compiled."""
    if device.type == "cpu":
        try:
            return fast.prepare(network, kernels=True)
        except UserError as error:
            info_once(f"Running without the C++ kernels, a little slower: {error}")
    return fast.prepare(network)
