"""Validation in which every rank takes its share of the images, with the figures that one process gives."""

import inspect
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from basicsr.data import build_dataloader, build_dataset
from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor, nn
from tqdm import tqdm

from esc_basicsr.archs.variants import RELEASED
from esc_basicsr.common import signals
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import make_folder_of, written_whole
from esc_basicsr.common.log import logger
from esc_basicsr.metrics.comparison_images import ComparisonImages
from esc_basicsr.metrics.result_files import file_name, write_csv
from esc_basicsr.metrics.results_table import ResultsTable, SetResult
from esc_basicsr.training.metric_records import MetricRecords
from esc_basicsr.training.ranks import described, gather, on_first_rank, own_rank, raise_everywhere
from esc_basicsr.weights.infer import infer_network_options

Image = npt.NDArray[np.uint8]
Upscale = Callable[[dict[str, Any]], Mapping[str, Tensor]]


class _ImageResult(NamedTuple):
    """The figures of one image; width and height are those of the SR image, in pixels."""

    position: int  # in the order that all ranks know
    image: str
    width: int
    height: int
    metrics: dict[str, float]


class SharedValidation:
    """Validation, in training and testing, that is shared by all ranks.

    Every image goes through the network once, on one of the ranks. Results are gathered and averaged in a
    way that does not depend on who measured what, so that metrics are those of one process.

    Of each ``val.batch_size`` images in turn, those of equal size that follow one another go through the
    network together. Which ones does not depend on the ranks.

    Args:
        opt: All options.
        variant: The published variant that a tested network is; None for another one.

    Attributes:
        records: Of the validations in training.
        means: The last validation's, by metric.
    """

    def __init__(self, opt: dict[str, Any], variant: str | None) -> None:
        self._opt = opt
        self._variant = variant
        self.records = MetricRecords()
        self.means: dict[str, float] = {}
        self._test_results: dict[str, SetResult] = {}

    def missing(self, iteration: int) -> list[str]:
        """Give the validation sets, by their keys in ``datasets``, that were not measured at an iteration."""
        if self._opt.get("val") is None:
            return []
        return [
            phase
            for phase, options in self._opt["datasets"].items()
            if phase.split("_")[0] == "val" and options["name"] not in self.records.measured(iteration)
        ]

    def missed(self, iteration: int) -> Iterator[Any]:
        """Make BasicSR's loaders of the sets that were to be measured at an iteration, and were not."""
        val = self._opt.get("val") or {}
        if val.get("metrics") is None or iteration % val["val_freq"]:
            return
        for phase in self.missing(iteration):
            section = self._opt["datasets"][phase]
            yield build_dataloader(build_dataset(section), section, self._opt["num_gpu"], self._opt["dist"])

    def run(
        self, upscale: Upscale, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool
    ) -> bool:
        """Measure on a validation or test set, together with the other ranks.

        In training the experiment's folder gets metrics/history.csv, all validations so far, and
        metrics/<set>.csv, each image of the last; TensorBoard the means, and a few images. In
        testing the results' folder gets metrics/<set>.csv, results.md and results.csv; the log shows the
        table when all sets are done. If a rank was asked to stop before all images were done, nothing is
        recorded, and the log says so.

        Args:
            upscale: Takes a batch of the data set, on this rank alone; gives ``lq``, ``result`` and, where
                the batch has it, ``gt``, (B, 3, H, W) on the CPU.
            dataloader: BasicSR's; its data set gives ``lq``, (3, H, W) in [0, 1], and ``lq_path``, and ``gt``
                where there is any. Without it, only metrics that need no reference are measured.
            current_iter: The iteration; in testing the run's name.
            tb_logger: TensorBoard's writer, or None, as on all ranks but the first, of whose share the
                images are. Those of a validation that is repeated it has already.
            save_img: Whether to save the SR images, under ``path.visualization``.

        Returns:
            Whether all images were measured; the same on all ranks.

        Raises:
            UserError: There are no images, or one cannot be read, measured or written; on every rank, naming
                it. An error that is not the user's is raised on its own rank as it is.
        """
        name, files = dataloader.dataset.opt["name"], _lr_files(dataloader.dataset)
        names = "\n".join(sorted(Path(file).name for file in files))
        seen = gather((len(files), zlib.crc32(names.encode("utf-8", "backslashreplace"))))
        if len(set(seen)) > 1:
            counts = ", ".join(str(count) for count, _ in seen)
            raise UserError(
                f"{name}: ranks see different images, so many each: {counts}. Give every machine the same "
                "files."
            )
        if not files:
            raise UserError(f"{name} holds no images to measure on.")
        is_known = name in self.records.measured(current_iter)
        comparisons = None if tb_logger is None or is_known else ComparisonImages(self._opt.get("scale", 1))
        # Not the data set's order: that is the file system's, which may differ from machine to machine.
        order = sorted(range(len(files)), key=lambda number: (files[number], number))
        error: Exception | None = None
        own: list[_ImageResult] = []
        try:
            save_as = current_iter if save_img else None
            own.extend(self._measure_share(upscale, dataloader, order, save_as, comparisons))
        except Exception as caught:  # whatever it is, the other ranks wait to hear of it
            error = caught
        wish = signals.requested()
        shares = gather((own, wish and wish.name))
        raise_everywhere(error)
        results = sorted(itertools.chain.from_iterable(share for share, _ in shares))
        if len(results) < len(order):
            if own_rank() == 0:
                signal_name = next(name for _, name in shares if name)
                logger.warning(
                    "Validation on %s stopped by %s after %d of %d images: nothing of it is recorded.",
                    *(name, signal_name, len(results), len(order)),
                )
            return False
        self._record(name, results, current_iter, tb_logger, comparisons)
        return True

    @property
    def _metrics(self) -> Mapping[str, Mapping[str, Any]]:
        return self._opt["val"].get("metrics") or {}

    def _measure_share(
        self,
        upscale: Upscale,
        dataloader: Any,
        order: Sequence[int],
        save_as: Any,
        comparisons: ComparisonImages | None,
    ) -> Iterator[_ImageResult]:
        """Read, upscale, save if ``save_as`` is an iteration or a name, and measure this rank's images.

        ``comparisons`` get what they take.
        """
        rank, ranks = own_rank(), dist.get_world_size() if dist.is_initialized() else 1
        name, size = dataloader.dataset.opt["name"], self._opt["val"].get("batch_size", 1)
        positions = range(len(order))
        shares = [positions[first : first + size] for first in positions[::size]][rank::ranks]
        label = name if ranks == 1 else f"{name} (1/{ranks} of it)"
        is_shown = self._opt["val"].get("pbar", False) and rank == 0
        with tqdm(total=sum(map(len, shares)), desc=label, unit="image", disable=not is_shown) as bar:
            for share in shares:
                for taken, batch in _batches(dataloader, order, share):
                    if signals.requested():
                        return
                    paths, visuals = batch["lq_path"], upscale(batch)
                    del batch
                    images = _images(visuals["result"])
                    references = _images(visuals["gt"]) if "gt" in visuals else [None] * len(images)
                    for position, path, lr, sr, reference in zip(
                        taken, paths, visuals["lq"], images, references, strict=True
                    ):
                        stem, (height, width) = Path(path).stem, sr.shape[:2]
                        if save_as is not None:
                            file = self._image_path(name, stem, save_as)
                            make_folder_of(file)
                            with written_whole(file) as png:
                                png.write(cv2.imencode(".png", sr)[1].tobytes())
                        metrics = self._measure(f"{name}: {path}", sr, reference)
                        if comparisons is not None:
                            comparisons.add(stem, lr, sr, reference, metrics)
                        yield _ImageResult(position, stem, width, height, metrics)
                        bar.update()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the memory that images of many sizes have left fits no training batch

    def _measure(self, label: str, sr: Image, reference: Image | None) -> dict[str, float]:
        images = {"img": sr} if reference is None else {"img": sr, "img2": reference}
        measured = {}
        for metric, options in self._metrics.items():
            if reference is None and _needs_reference(options):
                continue
            try:
                measured[metric] = float(calculate_metric(images, options))
            except Exception as error:  # BasicSR's own are assertions and whatever OpenCV raises
                message = f"{label}: {metric} cannot be measured: {described(error)}"
                if not self._opt["is_train"] or _needs_reference(options):
                    raise UserError(message) from error
                logger.error("%s; training goes on without it.", message)  # heard from every rank
        return measured

    def _image_path(self, name: str, image: str, save_as: Any) -> Path:
        folder = Path(self._opt["path"]["visualization"])
        if self._opt["is_train"]:
            return folder / file_name(image) / file_name(f"{image}_{save_as}.png")
        suffix = self._opt["val"].get("suffix") or self._opt["name"]
        return folder / file_name(name) / file_name(f"{image}_{suffix}.png")

    # What comes of it

    def _record(
        self,
        name: str,
        results: list[_ImageResult],
        current_iter: Any,
        tb_logger: Any,
        comparisons: ComparisonImages | None,
    ) -> None:
        """Take note of a validation on every rank; report it on the first."""
        self.means = {
            metric: math.fsum(result.metrics[metric] for result in results) / len(results)
            for metric in self._metrics
            if all(metric in result.metrics for result in results)
        }
        if self._opt["is_train"]:
            self.records.add(current_iter, name, len(results), self.means, self._metrics)
        else:
            self._test_results[name] = SetResult(len(results), self.means)

        def report() -> None:
            self._log(name, current_iter, tb_logger)
            if comparisons is not None:
                comparisons.write(tb_logger, name, current_iter)
            self._write(name, results, current_iter)

        on_first_rank(report)

    def _log(self, name: str, current_iter: Any, tb_logger: Any) -> None:
        skipped = [
            metric
            for metric, options in self._metrics.items()
            if metric not in self.means and _needs_reference(options)
        ]
        if skipped:
            logger.warning("%s has no HR images: %s not measured.", name, ", ".join(skipped))
        lines = [f"Validation {name}"]
        for metric, value in self.means.items():
            lines.append(f"\t # {metric}: {value:.4f}")
            if self._opt["is_train"]:
                best = self.records.best[name][metric]
                lines[-1] += f"\tBest: {best['val']:.4f} @ {best['iter']} iter"
            if tb_logger:
                tb_logger.add_scalar(f"metrics/{name}/{metric}", value, current_iter)
        if self.means:
            logger.info("%s", "\n".join([*lines, ""]))  # as BasicSR's log has it

    def _write(self, name: str, results: list[_ImageResult], current_iter: Any) -> None:
        is_train = self._opt["is_train"]
        root = Path(self._opt["path"]["experiments_root" if is_train else "results_root"])
        iteration = {"iter": current_iter} if is_train else {}
        # the other file there has this name
        stem = "%history" if name == "history" and is_train else file_name(name)
        write_csv(
            root / "metrics" / f"{stem}.csv",
            ["image", *iteration, "width", "height", *self._metrics],
            [
                [result.image, *iteration.values(), result.width, result.height]
                + [result.metrics.get(metric) for metric in self._metrics]
                for result in results
            ],
        )
        if is_train:
            history = self.records.history
            # an earlier part of a resumed training may have had other metrics
            columns = dict.fromkeys(itertools.chain(("iter", "set", "images"), *history))
            rows = [[entry.get(key) for key in columns] for entry in history]
            write_csv(root / "metrics" / "history.csv", [*columns], rows)
            return
        table = ResultsTable(
            name=self._opt["name"],
            scale=self._opt.get("scale"),
            checkpoint=self._opt["path"].get("pretrain_network_g"),
            variant=self._variant,
            metrics=self._metrics,
            results=self._test_results,
            is_padded=self._opt["val"].get("pad_to_window", False),
        )
        table.write(root)
        if {options["name"] for options in self._opt["datasets"].values()} <= self._test_results.keys():
            logger.info("Results, in %s:\n\n%s\n", root / "results.md", table.markdown())


def published_variant(net: nn.Module) -> str | None:
    """Name the one of `RELEASED` that a network is, at any scale, by its parameters; None for another."""
    options = infer_network_options(net.state_dict()) or {}
    options.pop("upscaling_factor", None)
    return next((name for name, known in RELEASED.items() if known == options), None)


def _lr_files(dataset: Any) -> list[str]:
    """Give each image's LR file if the data set keeps a list of them, as BasicSR's do; else empty texts."""
    paths = getattr(dataset, "paths", None)
    if not isinstance(paths, list) or len(paths) != len(dataset):
        return [""] * len(dataset)
    return [str(path.get("lq_path", "")) if isinstance(path, dict) else str(path) for path in paths]


def _batches(
    dataloader: Any, order: Sequence[int], positions: Sequence[int]
) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
    """Collate images of one size that follow one another; each batch comes with its images' positions."""
    items = ((position, _read(dataloader.dataset, order[position])) for position in positions)
    for _, group in itertools.groupby(items, key=lambda pair: _shapes(pair[1])):
        taken, batch = zip(*group, strict=True)
        yield taken, dataloader.collate_fn([*batch])


def _read(dataset: Any, number: int) -> Any:
    """Read an item of a data set.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return dataset[number]
    except UserError:
        raise
    except Exception as error:  # what BasicSR says of half a file is that None has no attribute astype
        file = _lr_files(dataset)[number] or f"image {number + 1} of {len(dataset)}"
        raise UserError(
            f"{dataset.opt['name']}: {file}, or the HR image that belongs to it, cannot be read: replace or "
            f"remove both ({described(error)})."
        ) from error


def _shapes(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.shape for key, value in item.items() if isinstance(value, Tensor)}


def _images(batch: Tensor) -> list[Image]:
    """Convert (B, C, H, W) in [0, 1] to 8-bit images, (H, W, 3) in OpenCV's order, or (H, W)."""
    return [tensor2img([image]) for image in batch.split(1)]


def _needs_reference(options: Mapping[str, Any]) -> bool:
    """Tell whether a metric compares with HR, that is, cannot be called without ``img2``."""
    parameters = inspect.signature(METRIC_REGISTRY.get(options["type"])).parameters
    return "img2" in parameters and parameters["img2"].default is inspect.Parameter.empty
