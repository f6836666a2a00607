"""Bicubic upscaling, measured on the real benchmarks by the shipped test options, is as published."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import yaml

from esc_basicsr.__main__ import main

OPTIONS = Path(__file__).resolve().parents[2] / "options"
# PSNR on Y in dB, a border of scale pixels cropped; the figures that papers of the field give
PUBLISHED = {"Set5": {2: 33.66, 3: 30.39, 4: 28.42}, "Set14": {2: 30.24, 3: 27.55, 4: 26.00}}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_psnr_through_the_test_command_is_the_published_one(data_root, tmp_path, monkeypatch, scale):
    monkeypatch.chdir(tmp_path)
    Path("datasets").mkdir()
    for name in PUBLISHED:
        shutil.copytree(data_root / name, Path("datasets", name))
    # the shipped file, less the sets that are not at hand
    options = yaml.safe_load((OPTIONS / f"test/Bicubic/Bicubic_x{scale}.yml").read_text())
    options["datasets"] = {k: v for k, v in options["datasets"].items() if v["name"] in PUBLISHED}
    options["num_gpu"] = 0
    Path("bicubic.yml").write_text(yaml.safe_dump(options))
    # BasicSR keeps one log file for a process: the first one's
    logging.getLogger("basicsr").handlers.clear()
    monkeypatch.setattr("basicsr.utils.logger.initialized_logger", {})
    assert main(["test", "-opt", "bicubic.yml"]) == 0
    log = next(Path("results").rglob("*.log")).read_text()
    measured = dict(re.findall(r"Validation (\w+)\s+# psnr: ([\d.]+)", log))
    assert set(measured) == set(PUBLISHED)
    for name, psnr in measured.items():
        assert float(psnr) == pytest.approx(PUBLISHED[name][scale], abs=0.1)
