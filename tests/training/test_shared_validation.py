"""Validation shared by ranks: the figures of one process, whoever measured what; records, files, errors."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.metrics import calculate_psnr
from basicsr.models.sr_model import SRModel
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from validating_ranks import METRICS, MIXED, SCALE, SETS, TINY, loader, lr_alone, options, paired, write_set

from esc_basicsr.common import signals
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import make_pair
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.fast import row_chunks
from esc_basicsr.training.esc_model import ESCModel


class Ranks:
    """What each rank knew in the end, and what they left, by the number of processes."""

    def __init__(self, work: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        script = Path(__file__).with_name("validating_ranks.py")
        self.done = subprocess.run(
            [sys.executable, str(script), str(work)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert self.done.returncode == 0, self.done.stdout
        self.work = work

    def known(self, world: int) -> list[dict[str, Any]]:
        return [json.loads((self.work / f"{world}_{rank}.json").read_text()) for rank in range(world)]

    def files(self, world: int) -> dict[str, bytes]:
        root = self.work / str(world)
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_has_the_metrics_of_one_process_exactly(ranks: Ranks, world: int) -> None:
    """Sets that the ranks do not divide, images of many sizes, fewer images than ranks, a set without HR."""
    (one,) = ranks.known(1)
    assert [(entry["set"], entry["images"]) for entry in one["history"]] == [
        *((name, len(sizes)) for name, sizes in SETS.items()),
        ("lr", len(MIXED)),
    ]
    assert all(entry.keys() >= METRICS.keys() for entry in one["history"][:-1])
    for known in ranks.known(world):
        assert known["problems"] == [None] * len(known["problems"])
        for key in ("history", "best", "history of 2"):
            assert known[key] == one[key]


def test_each_image_is_upscaled_once_by_a_rank_of_its_own_issue_635(ranks: Ranks) -> None:
    """In stock BasicSR rank 0 upscales all of them, while the others wait for it."""
    images = sum(map(len, SETS.values())) + len(MIXED)
    # of sets of 5, 1, 7 and 5 images
    shares = {world: [sum(known["batches"]) for known in ranks.known(world)] for world in (1, 2, 4)}
    assert shares == {1: [images], 2: [3 + 1 + 4 + 3, 2 + 3 + 2], 4: [2 + 1 + 2 + 2, 1 + 2 + 1, 4, 3]}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_leave_the_files_of_one_process(ranks: Ranks, world: int) -> None:
    """Images, results, tables of a test run; nothing beside them."""
    expected = {name: data for name, data in ranks.files(1).items() if "_5.png" not in name}
    found = {name: data for name, data in ranks.files(world).items() if "_5.png" not in name}
    assert found == expected
    assert {"metrics/history.csv", "metrics/mixed.csv", "test/metrics/single.csv", "test/results.md"} <= set(
        found
    )


def test_equal_sizes_that_follow_one_another_go_through_the_network_together(ranks: Ranks) -> None:
    """Which ones does not depend on the ranks."""
    batches = [
        sorted(itertools.chain.from_iterable(known["batches of 2"] for known in ranks.known(world)))
        for world in (1, 2, 4)
    ]
    # seven of one size; then the third of five begins a batch that the fourth does not fit
    assert batches == [[1] * 6 + [2] * 3] * 3
    (one,) = ranks.known(1)
    alone = {entry["set"]: entry for entry in one["history"]}
    for entry in one["history of 2"]:
        for metric in METRICS:
            assert entry[metric] == pytest.approx(alone[entry["set"]][metric], abs=1e-3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_that_one_rank_stopped_is_not_recorded_by_any(ranks: Ranks, world: int) -> None:
    for known in ranks.known(world):
        assert known["stopped"]
        assert known["nothing recorded"]
    done = {1: 1, 2: 4 + 1, 4: 2 + 1 + 2 + 1}[world]
    line = f"Validation on equal stopped by SIGTERM after {done} of 7 images: nothing of it is recorded."
    assert ranks.done.stdout.count(line) == 1


@pytest.mark.parametrize("world", [2, 4])
def test_unreadable_image_ends_validation_on_every_rank_by_its_name(ranks: Ranks, world: int) -> None:
    file = ranks.work / "data" / "broken" / "LR" / "03.png"
    reader = 3 % world
    for rank, known in enumerate(ranks.known(world)):
        message = known["unreadable"]
        assert message.startswith(
            f"UserError: broken: {file}, or the HR image that belongs to it, cannot be read"
        )
        assert message.endswith(f"(rank {reader})") is (rank != reader)


@pytest.mark.parametrize("world", [2, 4])
def test_error_of_the_network_stays_itself_on_its_rank_and_ends_the_others(ranks: Ranks, world: int) -> None:
    *others, failing = (known["failing"] for known in ranks.known(world))
    assert failing == "RuntimeError: no memory"
    assert others == [f"UserError: RuntimeError: no memory (rank {world - 1})"] * (world - 1)


def test_ranks_that_see_different_files_are_an_error(ranks: Ranks) -> None:
    for known in ranks.known(2):
        assert "mixed: ranks see different images, so many each: 5, 4." in known["other files"]


@pytest.mark.parametrize("world", [2, 4])
def test_order_of_a_machines_file_system_does_not_matter(ranks: Ranks, world: int) -> None:
    (one,) = ranks.known(1)
    for known in ranks.known(world):
        assert known["last"] == one["last"]


# One process


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data", MIXED[:3])


@pytest.fixture
def build(tmp_path: Path, data: Path) -> Callable[..., ESCModel]:
    """A model with a set named Set5; keys of ``val`` on top."""

    def make(
        is_train: bool = True, name: str = "Set5", opt: dict[str, Any] | None = None, **val: Any
    ) -> ESCModel:
        phase = "val" if is_train else "test"
        sets = {phase: paired(name, data, phase)}
        built = options(tmp_path / "run", **{"datasets": sets, "is_train": is_train, **(opt or {})})
        built["val"] |= val
        return ESCModel(built)

    return make


def validate(model: ESCModel, iteration: Any = 4, phase: str | None = None) -> None:
    phase = phase or next(iter(model.opt["datasets"]))
    save = model.opt["val"]["save_img"]
    model.validation(loader(model.opt["datasets"][phase]), iteration, None, save)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("is_train", [True, False])
def test_figures_and_images_are_stock_basicsrs(build: Callable[..., ESCModel], is_train: bool) -> None:
    model = build(is_train, suffix=None if is_train else "x")
    iteration = 4 if is_train else "run"
    validate(model, iteration)
    root = Path(model.opt["path"]["visualization"])
    ours = {file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")}
    for file in ours:
        (root / file).unlink()
    metrics = model.shared_validation.means
    section, *_ = model.opt["datasets"].values()
    SRModel.nondist_validation.__wrapped__(model, loader(section), iteration, None, True)
    assert metrics == pytest.approx(model.metric_results, rel=1e-12)
    assert ours == {file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")}
    expected = Path("00", "00_4.png") if is_train else Path("Set5", "00_x.png")
    assert expected in ours and len(ours) == 3


def test_results_of_each_image_and_history_are_on_the_disk_in_full(
    build: Callable[..., ESCModel], tmp_path: Path
) -> None:
    model = build()
    for iteration in (2, 4):
        validate(model, iteration)
    folder = tmp_path / "run" / "metrics"
    rows = read_csv(folder / "Set5.csv")
    assert [tuple(row.values())[:4] for row in rows] == [
        (f"{number:02}", "4", str(width), str(height)) for number, (height, width) in enumerate(MIXED[:3])
    ]
    (entry, last) = model.shared_validation.records.history
    assert sum(float(row["psnr"]) for row in rows) / 3 == pytest.approx(last["psnr"], rel=1e-12)
    history = read_csv(folder / "history.csv")
    assert [{**row, "psnr": float(row["psnr"]), "ssim": float(row["ssim"])} for row in history] == [
        {**known, "iter": str(known["iter"]), "images": "3"} for known in (entry, last)
    ]


def test_training_is_undisturbed(build: Callable[..., ESCModel]) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.net_g.state_dict().items()}
    validate(model)
    assert model.net_g.training
    torch.testing.assert_close(dict(model.net_g.state_dict()), before, rtol=0, atol=0)
    assert not any(hasattr(model, name) for name in ("lq", "gt", "output"))


def test_set_without_hr_has_no_metrics_that_need_it_and_takes_no_other_images_hr(
    build: Callable[..., ESCModel],
    data: Path,
    tmp_path: Path,
    esc_log: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def brightness(img: Any, **kwargs: Any) -> float:
        return float(img.mean())

    monkeypatch.setitem(METRIC_REGISTRY._obj_map, "brightness", brightness)
    model = build(opt={"datasets": {"val": lr_alone("pictures", data)}})
    model.feed_data({"lq": torch.rand(1, 3, 8, 8), "gt": torch.rand(1, 3, 16, 16)})  # a training batch
    validate(model, 2)
    assert model.shared_validation.records.history == [{"iter": 2, "set": "pictures", "images": 3}]
    assert "pictures has no HR images: psnr, ssim not measured." in esc_log
    model.opt["val"]["metrics"] = {"psnr": METRICS["psnr"], "brightness": {"type": "brightness"}}
    validate(model, 4)
    assert model.shared_validation.records.history[-1].keys() == {"iter", "set", "images", "brightness"}
    assert [row["psnr"] for row in read_csv(tmp_path / "run" / "metrics" / "pictures.csv")] == [""] * 3
    assert read_csv(tmp_path / "run" / "metrics" / "history.csv")[0]["brightness"] == ""


def test_validation_without_metrics_is_recorded_and_saves_images(
    build: Callable[..., ESCModel],
) -> None:
    model = build(metrics=None)
    validate(model)
    assert model.shared_validation.records.history == [{"iter": 4, "set": "Set5", "images": 3}]
    assert len(list(Path(model.opt["path"]["visualization"]).rglob("*.png"))) == 3


def test_last_validation_is_that_of_the_last_iteration_and_replaces_an_earlier_one(
    build: Callable[..., ESCModel],
) -> None:
    model = build()
    total = model.opt["train"]["total_iter"]
    for iteration in (4, total, total + 1):
        validate(model, iteration)
    assert [entry["iter"] for entry in model.shared_validation.records.history] == [4, total]
    with torch.no_grad():
        model.net_g.to_img.bias.add_(0.1)
    validate(model, total + 3)
    assert [entry["iter"] for entry in model.shared_validation.records.history] == [4, total]
    assert (
        model.shared_validation.records.history[0]["psnr"]
        != model.shared_validation.records.history[1]["psnr"]
    )


def test_best_records_keep_value_and_iteration(build: Callable[..., ESCModel]) -> None:
    metrics = {"psnr": METRICS["psnr"], "low": {**METRICS["psnr"], "better": "lower"}}
    model = build(metrics=metrics)
    validate(model, 2)
    with torch.no_grad():
        model.net_g.to_img.bias.add_(0.3)
    validate(model, 4)
    first, second = (entry["psnr"] for entry in model.shared_validation.records.history)
    higher, lower = (2, 4) if first > second else (4, 2)
    assert model.shared_validation.records.best["Set5"] == {
        "psnr": {"better": "higher", "val": max(first, second), "iter": higher},
        "low": {"better": "lower", "val": min(first, second), "iter": lower},
    }


def test_records_survive_a_training_state_and_other_metrics_afterwards(
    build: Callable[..., ESCModel], tmp_path: Path
) -> None:
    model = build(metrics={"psnr": METRICS["psnr"]})
    validate(model, 2)
    torch.save(model.shared_validation.records.state(), tmp_path / "state")
    resumed = build()
    resumed.shared_validation.records.restore(torch.load(tmp_path / "state", weights_only=True))
    assert resumed.shared_validation.records.state() == model.shared_validation.records.state()
    validate(resumed, 4)
    assert [set(entry) & set(METRICS) for entry in resumed.shared_validation.records.history] == [
        {"psnr"},
        {"psnr", "ssim"},
    ]
    assert resumed.shared_validation.records.best["Set5"]["ssim"]["iter"] == 4
    assert model.shared_validation.records.state() == torch.load(tmp_path / "state", weights_only=True)


def test_validations_missing_are_the_sets_without_an_entry(
    build: Callable[..., ESCModel], data: Path
) -> None:
    sets = {"val": paired("Set5", data), "val_2": paired("Set14", data)}
    model = build(opt={"datasets": sets})
    assert model.shared_validation.missing(4) == ["val", "val_2"]
    validate(model, 4, "val_2")
    assert model.shared_validation.missing(4) == ["val"]
    assert model.shared_validation.missing(2) == ["val", "val_2"]
    model.opt["val"] = None
    assert model.shared_validation.missing(2) == []


def test_stop_leaves_the_records_and_files_as_they_were(
    build: Callable[..., ESCModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    esc_log: list[str],
) -> None:
    model = build(metrics={"psnr": METRICS["psnr"]})
    validate(model, 2)
    before = model.shared_validation.records.state(), (tmp_path / "run" / "metrics" / "Set5.csv").read_bytes()
    monkeypatch.setattr(signals, "requested", lambda: signal.SIGINT)
    assert not model.shared_validation.run(
        model.upscale_batch, loader(model.opt["datasets"]["val"]), 4, None, True
    )
    assert (
        model.shared_validation.records.state(),
        (tmp_path / "run" / "metrics" / "Set5.csv").read_bytes(),
    ) == before
    assert "Validation on Set5 stopped by SIGINT after 0 of 3 images: nothing of it is recorded." in esc_log


def test_image_that_cannot_be_measured_is_named(build: Callable[..., ESCModel], data: Path) -> None:
    write_set(data / "other", [(24, 24)])
    (data / "other" / "HR" / "00.png").replace(data / "HR" / "01.png")
    with pytest.raises(
        UserError, match=r"Set5: .*LR/01.png: psnr cannot be measured: .*shapes are different"
    ):
        validate(build())


def test_niqe_on_images_too_small_for_it_ends_a_test_and_no_training(
    build: Callable[..., ESCModel], esc_log: list[str]
) -> None:
    metrics = {"psnr": METRICS["psnr"], "niqe": {"type": "calculate_niqe", "crop_border": 0}}
    model = build(metrics=metrics)
    validate(model)
    assert [*model.shared_validation.means] == ["psnr"]
    assert any("00.png: niqe cannot be measured" in line for line in esc_log)
    assert not any("no HR images" in line for line in esc_log)
    with pytest.raises(UserError, match=r"00\.png: niqe cannot be measured"):
        validate(build(is_train=False, metrics=metrics), "run")


def test_files_that_cannot_be_written_are_named(build: Callable[..., ESCModel], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "visualization").touch()
    with pytest.raises(UserError, match="visualization/00 cannot be made"):
        validate(build())
    (tmp_path / "run" / "metrics").touch()
    with pytest.raises(UserError, match=r"run/metrics cannot be made"):
        validate(build(save_img=False))


def test_set_without_images_is_named(build: Callable[..., ESCModel]) -> None:
    model = build()
    empty = loader(model.opt["datasets"]["val"])
    empty.dataset.paths.clear()
    with pytest.raises(UserError, match="Set5 holds no images"):
        model.validation(empty, 4, None, False)


def test_names_of_sets_stay_within_the_folders(build: Callable[..., ESCModel], tmp_path: Path) -> None:
    validate(build(False, name="../../escaped"), "run")
    assert (tmp_path / "run" / "metrics" / "%2E.%2F..%2Fescaped.csv").is_file()
    assert (tmp_path / "run" / "visualization" / "%2E.%2F..%2Fescaped" / "00_run.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run"}
    validate(build(name="history"), 2)
    names = {file.name for file in (tmp_path / "run" / "metrics").iterdir()}
    assert {"history.csv", "%history.csv"} <= names


def test_bar_counts_images_and_is_shown_if_wanted(
    build: Callable[..., ESCModel], capsys: pytest.CaptureFixture[str]
) -> None:
    validate(build(save_img=False))
    assert "image" not in capsys.readouterr().err
    validate(build(save_img=False, pbar=True))
    shown = capsys.readouterr().err
    assert "Set5: 100%" in shown and "3/3" in shown


def test_metrics_reach_the_log_and_tensorboard_as_stock_basicsrs(
    build: Callable[..., ESCModel],
) -> None:
    scalars = {}
    sheets = []

    class TensorBoard:
        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            scalars[name] = value, iteration

        def add_image(self, name: str, picture: object, iteration: int, dataformats: str) -> None:
            sheets.append((name, iteration))

    model = build()
    for _ in range(2):  # BasicSR validates once more at the end: images are not given twice
        model.validation(loader(model.opt["datasets"]["val"]), 4, TensorBoard(), False)
    assert scalars == {
        f"metrics/Set5/{metric}": (model.shared_validation.means[metric], 4) for metric in METRICS
    }
    assert sheets == [(f"bicubic_SR_GT/Set5/{image}", 4) for image in ("00", "01", "02")]


def test_results_of_a_test_run_are_shown_once_when_all_sets_are_done(
    build: Callable[..., ESCModel], data: Path, tmp_path: Path, esc_log: list[str]
) -> None:
    sets = {"test_1": paired("Set5", data, "test"), "test_2": paired("mine", data, "test")}
    model = build(False, opt={"datasets": sets})
    validate(model, "run", "test_1")
    table = (tmp_path / "run" / "results.md").read_text()
    assert "| Set5 |" in table and "mine" not in table
    assert not any("Results" in line for line in esc_log)
    validate(model, "run", "test_2")
    (shown,) = (line for line in esc_log if line.startswith("Results"))
    written = (tmp_path / "run" / "results.md").read_text()
    assert written.split("\n\n", 1)[1].strip() in shown
    own = read_csv(tmp_path / "run" / "results.csv")[0]
    assert float(own["mine psnr"]) == model.shared_validation.means["psnr"]
    assert model.shared_validation.records.history == []
    assert list(read_csv(tmp_path / "run" / "metrics" / "mine.csv")[0]) == [
        "image",
        "width",
        "height",
        *METRICS,
    ]


@pytest.mark.parametrize("network", ["ESC", "ESCFP"])
def test_image_worked_through_in_row_chunks_has_the_psnr_of_the_plain_one(
    build: Callable[..., ESCModel], monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    """Without gradients maps are worked through in chunks of rows, in validation too."""
    model = build(opt={"network_g": {**TINY, "type": network}})
    hr = torch.from_numpy(load_sample_image("coffee")).permute(2, 0, 1)[None]
    batch = make_pair(hr, SCALE)
    monkeypatch.setitem(row_chunks._CHUNK_PIXELS, "cpu", 2**13)
    assert len(list(row_chunks.overlapping_chunks(batch["lq"].clone()))) > 5
    model.feed_data(batch)
    model.test()
    plain = model.net_g.eval()(batch["lq"])
    assert plain.requires_grad
    reference = tensor2img([batch["gt"]])
    in_chunks, at_once = (
        calculate_psnr(tensor2img([sr]), reference, SCALE, test_y_channel=True)
        for sr in (model.output, plain)
    )
    assert in_chunks == pytest.approx(at_once, abs=0.005)
