"""The page: what it is made from, what it holds, what is refused."""

import io
import json
import os
import re
import shutil
import struct
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from basicsr.utils.options import dict2str
from browser import dom_after, find
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from esc_basicsr.__main__ import main
from esc_basicsr.metrics.comparison_images import ComparisonImages
from esc_basicsr.metrics.result_files import write_csv
from esc_basicsr.report import render
from esc_basicsr.report.events import event_files, read_events
from esc_basicsr.training.tensorboard_writer import TensorBoardWriter

LOG = "2026-01-02 03:04:05,678 INFO: "
needs_browser = pytest.mark.skipif(find() is None, reason="no Chromium or Chrome is installed")


class Elements(HTMLParser):
    """A page's elements, and the text of those with an id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = [dict(attrs).get("id") or tag]

    def handle_data(self, data: str) -> None:
        for name in self._inside:
            self.text[name] = self.text.get(name, "") + data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.text["data"])


def comparisons(iteration: int, count: int = 1) -> tuple[ComparisonImages, int]:
    drawn = ComparisonImages(2)
    rng = np.random.default_rng(iteration)
    lr = torch.full((3, 20, 30), 0.5)
    gt = np.full((40, 60, 3), 99, np.uint8)
    for number in range(count):
        sr = rng.integers(0, 256, gt.shape, dtype=np.uint8)
        drawn.add(f"image{number}", lr, sr, gt, {"psnr": 30.0})
    return drawn, iteration


class Training:
    """An experiment's folder, to be filled in part."""

    def __init__(self, work: Path, name: str = "run") -> None:
        self.folder = work / "experiments" / name
        self.folder.mkdir(parents=True)
        self.tb = work / "tb_logger" / name

    def log(self, options: Mapping[str, Any], losses: Mapping[int, float]) -> None:
        lines = [f"{LOG}{dict2str(options)}", f"{LOG}Start training from epoch: 0, iter: 0"]
        lines += [
            f"{LOG}[run..][epoch:  0, iter:{n:8,d}, lr:(1.000e-03,)] "
            f"[eta: 0:00:01, time (data): 0.100 (0.001)] l_pix: {loss:.4e} "
            for n, loss in losses.items()
        ]
        (self.folder / "train_run_1.log").write_text("\n".join(lines) + "\n")

    def history(self, rows: Mapping[int, float]) -> None:
        entries = [[n, "Set5", 5, value, None] for n, value in rows.items()]
        write_csv(self.folder / "metrics" / "history.csv", ["iter", "set", "images", "psnr", "niqe"], entries)

    def events(
        self, losses: Mapping[int, float], *shown: tuple[ComparisonImages, int], number: int = 0
    ) -> Path:
        before = {*event_files(self.tb)}
        writer = TensorBoardWriter(str(self.tb))
        for step, loss in losses.items():
            writer.add_scalar("losses/l_pix", loss, step)
        for drawn, iteration in shown:
            drawn.write(writer, "Set5", iteration)
        writer.close()
        (file,) = {*event_files(self.tb)} - before
        return file.rename(file.with_name(f"events.out.tfevents.{number}"))


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def report(*folders: Path, more: tuple[str, ...] = ()) -> str:
    output = folders[0].parent / "page.html"
    assert main(["report", *map(str, folders), "-o", str(output), *more]) == 0
    return output.read_text(encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def curve(page: str, name: str, of: int = 0) -> dict[int, float]:
    charts = {chart["name"]: chart["curves"] for chart in Elements(page).data["charts"]}
    (found,) = (entry for entry in charts[name] if entry["of"] == of)
    return dict(zip(found["x"], found["y"], strict=True))


def test_logs_alone_are_enough(training: Training) -> None:
    training.log({"name": "run", "train": {"total_iter": 9}}, {3: 0.5, 6: 0.25})
    page = report(training.folder)
    assert curve(page, "losses/l_pix") == {3: 0.5, 6: 0.25}
    assert curve(page, "lr") == {3: 1e-3, 6: 1e-3}
    assert "No validation was recorded" in page and not Elements(page).data["images"]


def test_tables_alone_are_enough(training: Training) -> None:
    training.history({5: 30.0, 10: 31.5, 15: 31.25})
    page = report(training.folder)
    assert curve(page, "metrics/Set5/psnr") == {5: 30.0, 10: 31.5, 15: 31.25}
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", page)
    assert cells[-6:] == ["Set5: PSNR (dB)", "run", "31.5000", "10", "31.2500", "15"]


def test_events_alone_are_enough(training: Training) -> None:
    training.events({1: 0.5, 2: float("inf")}, comparisons(2))
    for folder in (training.folder, training.tb):
        page = report(folder)
        assert curve(page, "losses/l_pix") == {1: 0.5}
        assert len(Elements(page).data["images"]) == 1


def test_events_of_a_resumed_training_count_once_the_last_ones(training: Training) -> None:
    training.events({1: 1.0, 2: 2.0, 3: 3.0}, comparisons(2), comparisons(3), number=1)
    training.events({2: 20.0, 5: 50.0}, comparisons(5), number=2)
    events = read_events(event_files(training.tb))
    assert events.curves["losses/l_pix"] == {1: 1.0, 2: 20.0, 5: 50.0}
    assert [place.iteration for place in events.comparisons] == [5]


def test_half_a_record_ends_a_file_and_a_damaged_one_is_told(training: Training, esc_log: list[str]) -> None:
    path = training.events({1: 1.0, 2: 2.0})
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert read_events([path]).curves["losses/l_pix"] == {1: 1.0}
    length = struct.pack("<Q", 4)
    path.write_bytes(whole + length + struct.pack("<I", masked_crc32c(length)) + b"\xff" * 8)
    assert read_events([path]).curves["losses/l_pix"] == {1: 1.0, 2: 2.0}
    assert f"{path} is damaged {len(whole):,} bytes in: what follows is skipped." in esc_log


def test_damaged_length_is_told_as_well(training: Training, esc_log: list[str]) -> None:
    path = training.events({1: 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + struct.pack("<QI", 2**40, 7) + b"lost")
    read_events([path])
    assert f"{path} is damaged {len(whole):,} bytes in: what follows is skipped." in esc_log


def test_page_needs_nothing_else(training: Training) -> None:
    training.events({1: 0.5}, comparisons(1))
    page = report(training.folder)
    for tag, attributes in Elements(page).elements:
        assert tag not in ("link", "iframe", "base", "object")
        assert not {"src", "href"} & attributes.keys()
    assert "url(" not in page and "@import" not in page and "fetch(" not in page
    (policy,) = (a["content"] for t, a in Elements(page).elements if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "@@" not in page


def test_names_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    name = "<img onerror=1><!--@@data@@"
    training = Training(tmp_path, name)
    training.log({"name": "run"}, {1: 0.5})
    training.history({1: 30.0})
    page = report(training.folder)
    assert "<img onerror" not in page
    assert Elements(page).data["names"] == [name]


def test_several_experiments_share_charts_and_their_settings_are_compared(tmp_path: Path) -> None:
    options = {"name": "one", "train": {"optim_g": {"lr": 0.1}}, "path": {"log": "somewhere"}, "scale": 2}
    first, second, third = (Training(tmp_path, name) for name in ("one", "two", "three"))
    first.log(options, {1: 0.5})
    second.log(
        {**options, "name": "two", "train": {"optim_g": {"lr": 0.2}}, "path": {"log": "elsewhere"}}, {1: 0.25}
    )
    third.history({1: 30.0})
    (third.folder / "train.yml").write_text(yaml.safe_dump({"scale": 2, "train": {"optim_g": {"lr": 0.1}}}))
    page = report(first.folder, second.folder, third.folder, first.folder)
    assert Elements(page).data["names"] == ["one", "two", "three"]
    assert curve(page, "losses/l_pix", 1) == {1: 0.25}
    settings = page[page.index("Settings that differ") :]
    assert re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", settings) == [
        *("Setting", "one", "two", "three"),
        *("train.optim_g.lr", "0.1", "0.2", "0.1"),
    ]


def test_experiments_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = []
    for root in ("a", "b"):
        training = Training(tmp_path / root)
        training.history({1: 30.0})
        folders.append(training.folder)
    assert Elements(report(*folders)).data["names"] == [str(folder) for folder in folders]


def test_a_lower_value_is_best_where_the_options_say_so(training: Training) -> None:
    training.log({"val": {"metrics": {"psnr": {"better": "lower"}}}}, {1: 0.5})
    training.history({5: 30.0, 10: 31.5})
    assert "<td>30.0000</td><td>5</td><td>31.5000</td><td>10</td>" in report(training.folder)


def test_long_curves_are_averaged(training: Training) -> None:
    training.log({}, dict.fromkeys(range(1, 2 * render.MAX_POINTS + 2), 0.5))
    page = report(training.folder)
    chart = Elements(page).data["charts"][0]["curves"][0]
    assert chart["each"] == 3 and len(chart["x"]) == 667 and chart["x"][:2] == [2, 5]
    assert {*chart["y"]} == {0.5}


def test_images_are_stored_once_with_their_metrics_and_within_bounds(
    training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training.events({1: 0.5}, comparisons(10, 2), comparisons(20, 2))
    write_csv(training.folder / "metrics" / "Set5.csv", ["image", "iter", "psnr"], [["image0", 20, 31.4]])
    data = Elements(report(training.folder)).data
    assert len(data["sources"]) == 2 + 4  # bicubic and GT, two images at two iterations
    assert [image["name"] for image in data["images"]] == ["Set5/image0", "Set5/image1"]
    shown = [
        (panel["kind"], panel.get("iter"), panel.get("metrics")) for panel in data["images"][0]["panels"]
    ]
    assert shown == [
        *(("bicubic", None, None), ("SR", 20, "PSNR 31.40 dB"), ("GT", None, None), ("SR", 10, ""))
    ]
    room = sum(len(source) for source in data["sources"]) - 1
    monkeypatch.setattr(render, "MAX_IMAGE_BYTES", room)
    capsys.readouterr()
    data = Elements(report(training.folder, more=("--overwrite",))).data
    assert sum(len(source) for source in data["sources"]) <= room
    assert [len(image["panels"]) for image in data["images"]] == [4, 3]
    assert "1 older comparison images were skipped" in capsys.readouterr().out


def test_what_is_no_experiment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert "no such folder" in refused(capsys, tmp_path / "absent", "-o", output)
    assert "is no experiment's folder" in refused(capsys, tmp_path, "-o", output)
    (tmp_path / "train_run_1.log").touch()
    assert "nothing was logged there yet" in refused(capsys, tmp_path, "-o", output)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "history.csv").write_text("a,b\n1,2\n")
    assert "is no history of validations" in refused(capsys, tmp_path, "-o", output)
    assert not output.exists()


def test_a_folder_among_others_that_is_no_experiment_is_left_out(
    training: Training, esc_log: list[str]
) -> None:
    training.history({1: 30.0})
    empty = training.folder.parent / "never_begun"
    empty.mkdir()
    page = training.folder.parent / "page.html"
    assert main(["report", str(empty), str(training.folder), "-o", str(page)]) == 0
    assert any(message.startswith(f"Skipped: {empty} is no experiment's folder") for message in esc_log)
    assert page.exists()


def test_a_page_that_exists_is_replaced_only_when_told(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.history({1: 30.0})
    output = training.folder.parent / "page.html"
    output.write_text("mine")
    assert "add --overwrite" in refused(capsys, training.folder, "-o", output)
    assert output.read_text() == "mine"
    assert "is a folder" in refused(capsys, training.folder, "-o", training.folder)
    assert report(training.folder, more=("--overwrite",)).startswith("<!DOCTYPE html>")


@needs_browser
@pytest.mark.parametrize("width", [1000, 500])
def test_browser_draws_reads_and_compares(tmp_path: Path, width: int) -> None:
    """The pointer reads curves, keys move along them, the divider moves, experiments are hidden."""
    first, second = (Training(tmp_path, name) for name in ("one", "two"))
    for training in (first, second):
        training.events({1: 0.5, 2: 0.25, 3: 0.125}, comparisons(3))
        training.history({2: 30.0, 3: 31.0})
    shutil.rmtree(second.tb)
    report(first.folder, second.folder)
    script = """
        const chart = (name) => document.querySelector(`[data-chart="${name}"]`);
        const press = (name, ...keys) => {
          for (const key of keys) chart(name).dispatchEvent(new KeyboardEvent("keydown", { key }));
        };
        press("metrics/Set5/psnr", "Home", "ArrowRight", "ArrowLeft");
        const box = chart("losses/l_pix").getBoundingClientRect();
        chart("losses/l_pix").dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 20 }));
        const divider = document.getElementById("divider");
        divider.value = 20;
        divider.dispatchEvent(new Event("input"));
        const say = (what, textContent) => {
          const line = Object.assign(document.createElement("p"), { id: `said ${what}`, textContent });
          document.body.append(line);
        };
        say("at", document.getElementById("compare").style.getPropertyValue("--at"));
        say("loss", chart("losses/l_pix").nextSibling.textContent);
        say("psnr", chart("metrics/Set5/psnr").nextSibling.textContent);
        say("lines", document.querySelectorAll("path.curve").length);
        say("wide", document.documentElement.scrollWidth > innerWidth);
        document.querySelectorAll("#controls input")[1].click();
        say("left", document.querySelectorAll("path.curve").length);
        say("label", chart("metrics/Set5/psnr").getAttribute("aria-label"));
        const images = [...document.querySelectorAll("#compare img")];
        say("drawn", images.every((image) => image.naturalWidth === 60));
    """
    dom = dom_after(first.folder.parent / "page.html", script, width)
    text = {
        key.removeprefix("said "): value.strip()
        for key, value in Elements(dom).text.items()
        if key.startswith("said ")
    }
    assert text["at"] == "20%"
    assert text["loss"].startswith("iteration 3one") and "(logged 0.125)" in text["loss"]
    assert text["psnr"] == "iteration 2one30two30"
    assert (text["lines"], text["left"]) == ("3", "2")
    assert text["label"] == "Set5: PSNR (dB). Last values: one 31 at iteration 3."
    assert (text["wide"], text["drawn"]) == ("false", "true")


def image_event(training: Training, content: bytes, tag: str = "bicubic_SR_GT/Set5/a") -> None:
    """Write an event with an image of any bytes."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    training.events({1: 0.5})
    (file,) = event_files(training.tb)
    image = Summary.Image(height=1, width=1, colorspace=3, encoded_image_string=content)
    event = Event(step=1, summary=Summary(value=[Summary.Value(tag=tag, image=image)])).SerializeToString()
    head = struct.pack("<Q", len(event))
    checksums = (struct.pack("<I", masked_crc32c(data)) for data in (head, event))
    file.write_bytes(file.read_bytes() + head + next(checksums) + event + next(checksums))


def encoded(kind: str, size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"no image",
        b"",
        encoded("GIF"),
        encoded("PNG")[:-20],
        encoded("PNG", (3, 2)),
    ],
    ids=["PostScript", "text", "nothing", "GIF", "cut short", "too small"],
)
def test_images_that_are_none_are_passed_over(
    training: Training, content: bytes, esc_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *arguments: pytest.fail("a program was started")
    )
    image_event(training, content)
    page = report(training.folder)
    assert curve(page, "losses/l_pix") == {1: 0.5}
    assert any("bicubic_SR_GT/Set5/a cannot be shown" in message for message in esc_log)


@pytest.mark.parametrize("value", ["inf", "nan", "1.7e308", "-1.7e308", "x", "", "9" * 5000])
@pytest.mark.parametrize("column", ["iter", "psnr"])
def test_tables_with_numbers_beyond_sense_are_read_or_refused(
    training: Training, value: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training.log({"name": "run"}, {1: 0.5})
    folder = training.folder / "metrics"
    folder.mkdir()
    row = {"iter": "2", "set": "Set5", "images": "5", "psnr": "30"} | {column: value}
    (folder / "history.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n" * 1)
    (folder / "Set5.csv").write_text(f"image,iter,psnr\na,{value},{value}\n")
    output = training.folder.parent / "page.html"
    code = main(["report", str(training.folder), "-o", str(output)])
    assert code in (0, 2)
    if code == 0:
        assert curve(output.read_text(), "losses/l_pix") == {1: 0.5}
    else:
        assert "no history of validations" in capsys.readouterr().err


def test_large_values_have_a_mean(training: Training) -> None:
    training.log({"name": "run"}, dict.fromkeys(range(1, 2 * render.MAX_POINTS + 1), 1.7e308))
    assert set(curve(report(training.folder), "losses/l_pix").values()) == {1.7e308}


def test_what_is_no_plain_file_is_not_waited_for(training: Training) -> None:
    training.log({"name": "run"}, {1: 0.5})
    (training.folder / "metrics").mkdir()
    for name in ("train_run_2.log", "run.yml", "metrics/history.csv", "metrics/Set5.csv"):
        os.mkfifo(training.folder / name)
    assert curve(report(training.folder), "losses/l_pix") == {1: 0.5}


def test_events_of_a_clock_that_was_set_back_lose_nothing(training: Training) -> None:
    training.events({1: 1.0, 2: 2.0}, comparisons(2), number=1)
    training.events({3: 3.0, 4: 4.0}, comparisons(4), number=0)
    events = read_events(event_files(training.tb))
    assert events.curves["losses/l_pix"] == {1: 1, 2: 2, 3: 3, 4: 4}
    assert [comparison.iteration for comparison in events.comparisons] == [2, 4]
