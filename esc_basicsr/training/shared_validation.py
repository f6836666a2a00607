"""Validation in which every rank takes its share of the images, with the figures that one process gives."""

import contextlib
import copy
import inspect
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from basicsr.metrics import calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor, nn
from tqdm import tqdm

from esc_basicsr.archs.variants import VARIANTS
from esc_basicsr.common import signals as stopping
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.metrics.comparison_images import ComparisonImages
from esc_basicsr.metrics.result_files import file_name, write_csv
from esc_basicsr.metrics.results_table import ResultsTable, SetResult
from esc_basicsr.weights.checkpoint import infer_network_options

__all__ = ["SharedValidation", "published_variant"]

T = TypeVar("T")
Picture = npt.NDArray[np.uint8]


class _ImageResult(NamedTuple):
    """What was measured on one image; width and height are those of the SR picture, in pixels."""

    place: int  # in the order that all ranks know
    image: str
    width: int
    height: int
    metrics: dict[str, float]


class _Share(NamedTuple):
    """What a rank has to tell of its share."""

    results: list[_ImageResult]
    stopped_by: str | None  # the signal


class SharedValidation(SRModel):
    """SRModel whose validation, in training and testing, is shared by all ranks.

    Every image goes through the network once, on one of the ranks. Results are gathered and averaged in a
    way that does not depend on who measured what, so that metrics are those of one process.

    Beyond SRModel's options, ``val.batch_size``: N. Of each N images in turn, those of equal size that follow
    one another go through the network together; 1 if left out. Which ones does not depend on the ranks.

    Attributes:
        metric_history: One plain dict for each validation in training, in order: ``iter``, ``set``,
            ``images`` (how many), and the mean of each metric under its name in the options.
        best_metric_results: As SRModel's: set -> metric -> ``better``, ``val``, ``iter``.
        metric_results: The last validation's means, by metric.
    """

    lq: Tensor
    gt: Tensor
    output: Tensor

    def __init__(self, opt: dict[str, Any]) -> None:
        self.metric_history: list[dict[str, Any]] = []
        self.best_metric_results: dict[str, dict[str, dict[str, Any]]] = {}
        self.metric_results: dict[str, float] = {}
        self._test_results: dict[str, SetResult] = {}
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Put a network where it runs; for several GPUs it is wrapped, if it has anything to train."""
        if any(parameter.requires_grad for parameter in net.parameters()):
            return super().model_to_device(net)
        return net.to(self.device)

    def init_training_settings(self) -> None:
        """Set up what training needs, the EMA weights equal on all ranks, since all of them validate."""
        super().init_training_settings()
        if self.opt["dist"] and hasattr(self, "net_g_ema"):
            for tensor in self.net_g_ema.state_dict().values():
                dist.broadcast(tensor, src=0)

    # The records

    def metrics_state(self) -> dict[str, Any]:
        """The history and the best records, in plain values, for a training state."""
        return copy.deepcopy({"history": self.metric_history, "best": self.best_metric_results})

    def restore_metrics(self, state: Mapping[str, Any]) -> None:
        """Go on from the records that `metrics_state` gave."""
        state = copy.deepcopy(dict(state))
        self.metric_history, self.best_metric_results = state["history"], state["best"]

    def validations_missing(self, iteration: int) -> list[str]:
        """The validation sets, by their keys in ``datasets``, that were not measured at an iteration."""
        if self.opt.get("val") is None:
            return []
        measured = {entry["set"] for entry in self.metric_history if entry["iter"] == iteration}
        return [
            phase
            for phase, options in self.opt["datasets"].items()
            if phase.split("_")[0] == "val" and options["name"] not in measured
        ]

    # Validation

    def validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        """Measure on a validation or test set, together with the other ranks.

        In training the experiment's folder gets metrics/history.csv, all validations so far, and
        metrics/<set>.csv, each image of the last; TensorBoard the means, and pictures of a few images. In
        testing the results' folder gets metrics/<set>.csv, results.md and results.csv; the log shows the
        table when all sets are done. If a rank was asked to stop before all images were done, nothing is
        recorded, and the log says so.

        Args:
            dataloader: BasicSR's; its data set gives ``lq``, (3, H, W) in [0, 1], and ``lq_path``, and ``gt``
                where there is any. Without it, only metrics that need no reference are measured.
            current_iter: The iteration; in testing the run's name. BasicSR validates once more when it has
                counted beyond ``total_iter``: that is ``total_iter``'s validation.
            tb_logger: TensorBoard's writer, or None, as on all ranks but the first, of whose share the
                pictures are. Those of a validation that is repeated it has already.
            save_img: Whether to save the SR pictures, under ``path.visualization``.

        Raises:
            UserError: There are no images, or one cannot be read, measured or written; on every rank, naming
                it. An error that is not the user's is raised on its own rank as it is.
        """
        if self.is_train:
            current_iter = min(int(current_iter), int(self.opt["train"]["total_iter"]))
        name, files = dataloader.dataset.opt["name"], _lr_files(dataloader.dataset)
        names = "\n".join(sorted(Path(file).name for file in files))
        seen = self._gather((len(files), zlib.crc32(names.encode("utf-8", "backslashreplace"))))
        if len(set(seen)) > 1:
            counts = ", ".join(str(count) for count, _ in seen)
            raise UserError(
                f"{name}: ranks see different images, so many each: {counts}. Give every machine the same "
                "files."
            )
        if not files:
            raise UserError(f"{name} holds no images to measure on.")
        known = any((entry["iter"], entry["set"]) == (current_iter, name) for entry in self.metric_history)
        sheets = None if tb_logger is None or known else ComparisonImages(self.opt.get("scale", 1))
        results = self._work_together(dataloader, files, current_iter if save_img else None, sheets)
        if len(results) == len(files):
            self._record(name, results, current_iter, tb_logger, sheets)

    def test(self) -> None:
        """Upscale ``lq`` by the EMA network if there is one. No other rank takes part, even in training."""
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.get_bare_model(self.net_g)
        was_training = net.training
        net.eval()
        with torch.no_grad():
            self.output = net(self.lq)
        net.train(was_training)

    @property
    def _metrics(self) -> Mapping[str, Mapping[str, Any]]:
        return self.opt["val"].get("metrics") or {}

    def _is_first(self) -> bool:
        return not self.opt["dist"] or dist.get_rank() == 0

    def _gather(self, own: T) -> list[T]:
        """What each rank gives, in their order, on every rank."""
        if not self.opt["dist"]:
            return [own]
        everyones = [own] * dist.get_world_size()
        dist.all_gather_object(everyones, own)
        return everyones

    def _raise_everywhere(self, error: Exception | None) -> None:
        """Raise an error that any rank has: on its rank as it is, elsewhere as one of the user's."""
        told = self._gather(None if error is None else _say(error))
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise UserError(f"{text} (rank {rank})")

    def _work_together(
        self, dataloader: Any, files: Sequence[str], save_as: Any, sheets: ComparisonImages | None
    ) -> list[_ImageResult]:
        """Results in the order of the images' files. Some are missing if a rank was asked to stop."""
        # Not the data set's: that is the file system's, which may differ from machine to machine.
        order = sorted(range(len(files)), key=lambda number: (files[number], number))
        error: Exception | None = None
        results: list[_ImageResult] = []
        try:
            for result in self._work_through_share(dataloader, order, save_as, sheets):
                results.append(result)
        except Exception as caught:  # whatever it is, the other ranks wait to hear of it
            error = caught
        wish = stopping.requested()
        shares = self._gather(_Share(results, wish.name if wish else None))
        self._raise_everywhere(error)
        done = sorted(itertools.chain.from_iterable(share.results for share in shares))
        if len(done) < len(order) and self._is_first():
            logger.warning(
                "Validation on %s stopped by %s after %d of %d images: nothing of it is recorded.",
                dataloader.dataset.opt["name"],
                next(share.stopped_by for share in shares if share.stopped_by),
                *(len(done), len(order)),
            )
        return done

    def _work_through_share(
        self, dataloader: Any, order: Sequence[int], save_as: Any, sheets: ComparisonImages | None
    ) -> Iterator[_ImageResult]:
        """Read, upscale, save if ``save_as`` is an iteration or a name, and measure this rank's images.

        ``sheets`` get what they take.
        """
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self.opt["dist"] else (0, 1)
        name, size = dataloader.dataset.opt["name"], self.opt["val"].get("batch_size", 1)
        places = range(len(order))
        shares = [places[first : first + size] for first in places[::size]][rank::ranks]
        label = name if ranks == 1 else f"{name} (1/{ranks} of it)"
        is_shown = self.opt["val"].get("pbar", False) and rank == 0
        with tqdm(total=sum(map(len, shares)), desc=label, unit="image", disable=not is_shown) as bar:
            for share in shares:
                for taken, batch in self._batches(dataloader, order, share):
                    if stopping.requested():
                        return
                    paths = batch["lq_path"]
                    lrs, pictures, references = self._upscaled(batch)
                    del batch
                    for row, (place, path) in enumerate(zip(taken, paths, strict=True)):
                        picture, image = pictures[row], Path(path).stem
                        if save_as is not None:
                            _write_picture(self._picture_path(name, image, save_as), picture)
                        reference = references[row] if references else None
                        metrics = self._measure(f"{name}: {path}", picture, reference)
                        if sheets is not None:
                            sheets.add(image, lrs[row], picture, reference, metrics)
                        height, width = picture.shape[:2]
                        yield _ImageResult(place, image, width, height, metrics)
                        bar.update()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what images of many sizes have left fits no training batch

    def _batches(
        self, dataloader: Any, order: Sequence[int], places: Sequence[int]
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Batches of images of one size that follow one another, each with its images' places."""
        waiting: dict[int, Any] = {}

        def batch() -> tuple[list[int], dict[str, Any]]:
            taken, images = list(waiting), dataloader.collate_fn(list(waiting.values()))
            waiting.clear()  # copies are in the batch
            return taken, images

        shapes: dict[str, Any] = {}
        for place in places:
            item = _read(dataloader.dataset, order[place])
            if waiting and _shapes(item) != shapes:
                yield batch()
            waiting[place], shapes = item, _shapes(item)
            del item
        if waiting:
            yield batch()

    def _upscaled(self, batch: dict[str, Any]) -> tuple[Tensor, list[Picture], list[Picture]]:
        """LR images of a batch, (B, 3, H, W), SR pictures, and HR pictures if there are any."""
        self.__dict__.pop("gt", None)  # of another batch
        self.feed_data(batch)
        self.test()
        visuals = self.get_current_visuals()
        del self.lq, self.output
        self.__dict__.pop("gt", None)
        references = _pictures(visuals["gt"]) if "gt" in visuals else []
        return visuals["lq"], _pictures(visuals["result"]), references

    def _measure(self, label: str, picture: Picture, reference: Picture | None) -> dict[str, float]:
        images = {"img": picture} if reference is None else {"img": picture, "img2": reference}
        measured = {}
        for metric, options in self._metrics.items():
            if reference is None and _needs_reference(options):
                continue
            try:
                measured[metric] = float(calculate_metric(images, options))
            except Exception as error:  # BasicSR's own are assertions and whatever OpenCV raises
                raise UserError(f"{label}: {metric} cannot be measured: {_say(error)}") from error
        return measured

    def _picture_path(self, name: str, image: str, save_as: Any) -> Path:
        folder = Path(self.opt["path"]["visualization"])
        if self.is_train:
            return folder / file_name(image) / file_name(f"{image}_{save_as}.png")
        suffix = self.opt["val"].get("suffix") or self.opt["name"]
        return folder / file_name(name) / file_name(f"{image}_{suffix}.png")

    # What comes of it

    def _record(
        self,
        name: str,
        results: list[_ImageResult],
        current_iter: Any,
        tb_logger: Any,
        sheets: ComparisonImages | None,
    ) -> None:
        """Take note of a validation on every rank; tell of it on the first."""
        measured = [metric for metric in self._metrics if all(metric in result.metrics for result in results)]
        self.metric_results = {
            metric: math.fsum(result.metrics[metric] for result in results) / len(results)
            for metric in measured
        }
        self._initialize_best_metric_results(name)
        for metric, value in self.metric_results.items():
            self._update_best_metric_result(name, metric, value, current_iter)
        if self.is_train:
            self._enter({"iter": current_iter, "set": name, "images": len(results), **self.metric_results})
        else:
            self._test_results[name] = SetResult(len(results), self.metric_results)
        error: Exception | None = None
        if self._is_first():
            try:
                self._tell(name, measured, current_iter, tb_logger)
                if sheets is not None:
                    sheets.write(tb_logger, name, current_iter)
                self._write(name, results, current_iter)
            except Exception as caught:
                error = caught
        self._raise_everywhere(error)

    def _tell(self, name: str, measured: Sequence[str], current_iter: Any, tb_logger: Any) -> None:
        left_out = [metric for metric in self._metrics if metric not in measured]
        if left_out:
            logger.warning("%s has no HR images: %s not measured.", name, ", ".join(left_out))
        if measured:
            self._log_validation_metric_values(current_iter, name, tb_logger)

    def _initialize_best_metric_results(self, dataset_name: str) -> None:
        """Have a record for each metric of the options, also where a resumed training had other metrics."""
        records = self.best_metric_results.setdefault(dataset_name, {})
        for metric, options in self._metrics.items():
            better = options.get("better", "higher")
            worst = -math.inf if better == "higher" else math.inf
            records.setdefault(metric, {"better": better, "val": worst, "iter": -1})

    def _enter(self, entry: dict[str, Any]) -> None:
        """Put an entry at the end of the history, or in the place of the one that it repeats."""
        for number, known in enumerate(self.metric_history):
            if (known["iter"], known["set"]) == (entry["iter"], entry["set"]):
                self.metric_history[number] = entry
                return
        self.metric_history.append(entry)

    def _write(self, name: str, results: list[_ImageResult], current_iter: Any) -> None:
        root = Path(self.opt["path"]["experiments_root" if self.is_train else "results_root"])
        iteration = {"iter": current_iter} if self.is_train else {}
        # the other file there has this name
        stem = "%history" if name == "history" and self.is_train else file_name(name)
        write_csv(
            root / "metrics" / f"{stem}.csv",
            ["image", *iteration, "width", "height", *self._metrics],
            [
                [result.image, *iteration.values(), result.width, result.height]
                + [result.metrics.get(metric) for metric in self._metrics]
                for result in results
            ],
        )
        if self.is_train:
            self._write_history(root / "metrics" / "history.csv")
        else:
            self._write_table(root)

    def _write_history(self, path: Path) -> None:
        # an earlier part of a resumed training may have had other metrics
        columns = dict.fromkeys(itertools.chain(("iter", "set", "images"), *self.metric_history))
        write_csv(path, list(columns), [[entry.get(key) for key in columns] for entry in self.metric_history])

    def _write_table(self, root: Path) -> None:
        table = ResultsTable(
            name=self.opt["name"],
            scale=self.opt.get("scale"),
            checkpoint=self.opt["path"].get("pretrain_network_g"),
            variant=published_variant(self.get_bare_model(self.net_g)),
            metrics=self._metrics,
            results=self._test_results,
        )
        table.write(root)
        if {options["name"] for options in self.opt["datasets"].values()} <= self._test_results.keys():
            logger.info("Results, in %s:\n\n%s\n", root / "results.md", table.markdown())


def published_variant(net: nn.Module) -> str | None:
    """Which of `VARIANTS` a network is, at any scale, by its parameters; None if it is another network."""
    options = infer_network_options(net.state_dict()) or {}
    options.pop("upscaling_factor", None)
    return next((name for name, known in VARIANTS.items() if known == options), None)


def _say(error: Exception) -> str:
    """An error in a line or two: a user's in its own words, any other with its kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _lr_files(dataset: Any) -> list[str]:
    """Each image's LR file where the data set, as BasicSR's do, keeps a list of them; else empty texts."""
    paths = getattr(dataset, "paths", None)
    if not isinstance(paths, list) or len(paths) != len(dataset):
        return [""] * len(dataset)
    return [str(path.get("lq_path", "")) if isinstance(path, dict) else str(path) for path in paths]


def _read(dataset: Any, number: int) -> Any:
    """An item of a data set.

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
            f"remove both ({_say(error)})."
        ) from error


def _shapes(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.shape for key, value in item.items() if isinstance(value, Tensor)}


def _pictures(images: Tensor) -> list[Picture]:
    """Images (B, C, H, W) in [0, 1] as 8-bit pictures, (H, W, 3) in OpenCV's order, or (H, W)."""
    return [tensor2img([image]) for image in images.split(1)]


def _needs_reference(options: Mapping[str, Any]) -> bool:
    """Whether a metric compares with HR: whether it cannot be called without ``img2``."""
    parameters = inspect.signature(METRIC_REGISTRY.get(options["type"])).parameters
    return "img2" in parameters and parameters["img2"].default is inspect.Parameter.empty


def _write_picture(path: Path, picture: Picture) -> None:
    """Write a PNG, at once: two ranks may have images of one name.

    Raises:
        UserError: It cannot be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    partial = path.with_name(f"{path.name}.partial{rank}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
