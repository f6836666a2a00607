"""README and docs hold: examples run, commands and links exist, the table of variants is what is built."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from PIL import Image

from esc_basicsr.__main__ import COMMANDS, main
from esc_basicsr.archs.variants import VARIANTS, build_variant
from esc_basicsr.commands import compare as compare_command
from esc_basicsr.data.sample_images import load_sample_image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "datasets/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BENCHMARKS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
# What makes the README's training a matter of seconds. Everything else is as written.
SHORT = [
    "num_gpu=0",
    "network_g:dim=16",
    "network_g:pdim=4",
    "network_g:window_size=8",
    "network_g:n_blocks=1",
    "train:total_iter=2",
    "logger:print_freq=1",
    "datasets:train:global_batch_size=2",
    "datasets:train:num_worker_per_gpu=0",
    "datasets:train:persistent_workers=false",
    "datasets:train:pin_memory=false",
]


def block(marker: str, page: str = "README.md") -> str:
    """The code block after ``<!-- marker -->``."""
    text = (ROOT / page).read_text("utf-8")
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert found, marker
    return found[1]


@pytest.mark.parametrize(
    "code",
    re.findall(r"```python\n(.*?)```", README + (ROOT / "docs/speed.md").read_text("utf-8"), re.DOTALL),
)
def test_python_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> Path:
    """A folder in which a newcomer has put images and the shipped options."""
    folder = tmp_path_factory.mktemp("newcomer")
    run_lines(block("install commands").splitlines()[1:], folder)
    for name, photograph, size in (("DIV2K_train_HR", "coffee", 390), ("Set5_HR", "chelsea", 48)):
        (folder / name).mkdir()
        image = load_sample_image(photograph)[:size, :size, ::-1]
        cv2.imwrite(str(folder / name / f"{photograph}.png"), image)
    return folder


def run_lines(lines: list[str], folder: Path, *extra: str) -> list[str]:
    """Run command lines of the README in ``folder``, by this Python, and return what each printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    outputs = []
    for line in lines:
        program, *arguments = line.split()
        if program == "torchrun":
            arguments = ["-m", "torch.distributed.run", "--standalone", *arguments]
        else:
            assert program == "python"
        result = subprocess.run(
            [sys.executable, *arguments, *extra], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        outputs.append(result.stdout + result.stderr)
    return outputs


@pytest.mark.slow
def test_data_train_and_test_commands_take_a_newcomer_through(newcomer):
    run_lines(block("data commands").splitlines(), newcomer)
    assert (newcomer / "datasets/DIV2K/DIV2K_train_LR_bicubic_X3_sub.lmdb/data.mdb").is_file()
    # the same image stands in for the other sets
    for name in BENCHMARKS[1:]:
        shutil.copytree(newcomer / "datasets/Set5", newcomer / "datasets" / name)

    single, several = block("train commands").splitlines()
    # 390 pixels make one sub-image, less than a batch
    several = several.replace("--nproc_per_node=4", "--nproc_per_node=2")
    enlarged = "datasets:train:dataset_enlarge_ratio=4"
    for output in run_lines([single, several], newcomer, "--force_yml", *SHORT, enlarged):
        assert "End of training" in output
    for name in ("ESC-light_x2_DIV2K", "ESC_x2_DIV2K"):
        assert (newcomer / "experiments" / name / "models" / "net_g_latest.pth").is_file()

    bicubic, esc = block("test-set commands").splitlines()
    network = [option for option in SHORT if option.startswith(("num_gpu", "network_g"))]
    outputs = run_lines([bicubic], newcomer) + run_lines([esc], newcomer, "--force_yml", *network)
    for output in outputs:
        measured = re.findall(r"Validation (\w+)\s+.*?# psnr: ([\d.]+).*?# ssim: ([\d.]+)", output, re.DOTALL)
        assert sorted(name for name, _, _ in measured) == sorted(BENCHMARKS)
    checked = newcomer / "options/train/ESC/ESC_x2_DFLIP.yml"
    assert main(["options", "--check", str(checked)]) == 2  # the other DFLIP sets are not there


@pytest.mark.slow
def test_upscale_commands_make_images_larger(tmp_path):
    photo = Image.fromarray(load_sample_image("chelsea")[:24, :20])
    (tmp_path / "holiday").mkdir()
    for name in ("photo.jpg", "holiday/cat.png"):
        photo.save(tmp_path / name)
    shipped, first, second, fitted = block("upscale commands").splitlines()
    for line, scale in ((first, 4), (second, 2)):
        checkpoint = tmp_path / re.search(r"--model (\S+)", line)[1]
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"params_ema": build_variant("ESC-light", scale).state_dict()}, checkpoint)
    run_lines([shipped, first, second, fitted.replace("3840x2160", "100x60")], tmp_path)
    run_lines([block("export commands").splitlines()[1]], tmp_path)
    assert (tmp_path / "ESC_x4.onnx").is_file()
    results = (("photo_x4.png", 4), ("photo_x4.jpg", 4), ("large/cat_x2.png", 2), ("photo_4k.png", 2.5))
    for name, scale in results:
        with Image.open(tmp_path / name) as large:
            assert large.size == (20 * scale, 24 * scale)


# What makes each a matter of seconds: small images, one run, few networks.
SMALL = {
    "compare": "--repeats 1 --warmup 0 --network ESC ESC-light HiT-SRF",
    "compare --ablation": "--repeats 1 --warmup 0",
    "lam": "--crop 64 --fold 1",
    "erf": "--images camera --size 48 --positions 1",
    "similarity": "--images camera --size 32",
    "features": "--size 32",
}


@pytest.mark.slow
@pytest.mark.parametrize("line", block("compare commands", "docs/compare.md").splitlines())
def test_networks_are_compared_and_looked_into(line, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_command, "OUTPUT_HEIGHT", 64)
    monkeypatch.setattr(compare_command, "OUTPUT_WIDTH", 64)
    monkeypatch.setattr("esc_basicsr.lab.measure.benchmark.peak_memory_growth", lambda build, lq: 0)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("chelsea")[:128, :160]).save("photo.png")
    python, module, package, *arguments = line.split()
    assert (python, module, package) == ("python", "-m", "esc_basicsr")
    kind = arguments[1] if arguments[0] == "analyze" else arguments[0]
    kind += " --ablation" * ("--ablation" in arguments)
    assert main([*arguments, "--device", "cpu", *SMALL[kind].split()]) == 0
    folder = tmp_path / arguments[arguments.index("-o") + 1]
    assert {".json", ".md", ".png"} <= {path.suffix for path in folder.iterdir()}


def test_table_of_networks_has_the_parameters_that_are_built():
    for variant in VARIANTS:
        counts = [sum(p.numel() for p in build_variant(variant, scale).parameters()) for scale in (2, 3, 4)]
        row = next(line for line in README.splitlines() if line.startswith(f"| {variant} | `"))
        assert " / ".join(f"{count:,}" for count in counts) in row


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exited:
        main([command, "--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m esc_basicsr {command}" in text
    assert len(text.splitlines()) > 5


def test_help_lists_every_command_and_an_unknown_one_is_refused(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    with pytest.raises(SystemExit) as exited:
        main(["upscal"])
    assert exited.value.code == 2
    assert "invalid choice: 'upscal'" in capsys.readouterr().err


def test_no_command_shows_the_commands(capsys):
    assert main([]) == 2
    text = capsys.readouterr().err
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_named_files_and_commands_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"-opt (options/[^\s`]+)|python (\S+\.py)", text):
        assert (ROOT / "".join(path)).is_file(), path
    for command in re.findall(r"python -m esc_basicsr (\w[\w-]*)", text):
        assert command in COMMANDS, command
    for module in re.findall(r"`esc_basicsr/(?!.*NAME)([\w/.]+)`", text):
        assert (ROOT / "esc_basicsr" / module).exists(), module


def test_readme_is_short_and_every_page_is_in_the_index():
    assert len(README.split()) < 1000
    index = (ROOT / "docs/README.md").read_text("utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))
