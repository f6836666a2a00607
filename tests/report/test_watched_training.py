"""A training that was resumed from before its last iteration, as TensorBoard and the report show it."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import live, paired, training_options, write, write_images

from esc_basicsr.__main__ import main


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    write_images(folder / "train", 4, 24, 24)
    write_images(folder / "val", 4, 20, 32)
    options = training_options(
        paired("tiny", folder / "train", gt_size=16, use_hflip=True, use_rot=False),
        paired("Set4", folder / "val"),
    )
    options["train"]["total_iter"] = 6
    options["datasets"]["train"] |= {"num_worker_per_gpu": 0, "persistent_workers": False}
    write(folder / "train.yml", options)
    again = ["--force_yml", "path:resume_state=experiments/single/training_states/2.state"]
    lives = live(folder, [{"arguments": []}, {"arguments": again}])
    assert [life["codes"] for life in lives] == [[0], [0]], lives[1]["output"]
    return folder


def test_tensorboard_shows_each_iteration_once(work: Path) -> None:
    events = EventAccumulator(str(work / "tb_logger" / "single"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("losses/l_pix")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([0.01] * 3 + [0.005] * 3)
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))
    assert {event.step for event in events.Scalars("metrics/Set4/psnr")} == {2, 4, 6}
    tags = [f"bicubic_SR_GT/Set4/{number}" for number in range(3)]
    assert events.Tags()["images"] == tags
    assert [event.step for event in events.Images(tags[0])] == [2, 4, 6]


def test_report_shows_it_all(work: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(work / "experiments" / "single"), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found
    data = json.loads(found[1])
    curves = {chart["name"]: chart["curves"][0]["x"] for chart in data["charts"]}
    assert list(curves) == [
        *("losses/l_pix", "metrics/Set4/psnr", "metrics/Set4/ssim", "lr", "images_per_second")
    ]
    assert curves["losses/l_pix"] == curves["lr"] == [1, 2, 3, 4, 5, 6]
    assert curves["metrics/Set4/psnr"] == [2, 4, 6]
    assert [image["name"] for image in data["images"]] == [f"Set4/{number}" for number in range(3)]
    newest = next(panel for panel in data["images"][0]["panels"] if panel["kind"] == "SR")
    assert newest["iter"] == 6 and newest["metrics"].startswith("PSNR ")
