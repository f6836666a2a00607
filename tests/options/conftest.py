"""Option files that are sound, with the data they name."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs import build_network
from PIL import Image

from esc_basicsr.weights.shipped import model_list

SOUND = """\
name: Tiny_x2
model_type: SRModel
scale: 2
num_gpu: 0
manual_seed: 0
datasets:
  train:
    name: Train
    type: PairedImageDataset
    dataroot_gt: datasets/Train/HR.lmdb
    dataroot_lq: datasets/Train/LR.lmdb
    io_backend: {type: lmdb}
    gt_size: 16
    use_hflip: true
    use_rot: true
    batch_size_per_gpu: 4
    num_worker_per_gpu: 0
    dataset_enlarge_ratio: 1
  val:
    name: Val
    type: PairedImageDataset
    dataroot_gt: datasets/Val/HR
    dataroot_lq: datasets/Val/LR
    filename_tmpl: '{}x2'
    io_backend: {type: disk}
network_g: {type: MSRResNet, num_feat: 8, num_block: 1, upscale: 2}
path: {pretrain_network_g: ~, strict_load_g: true, resume_state: ~}
train:
  total_iter: 100
  warmup_iter: -1
  ema_decay: 0.999
  optim_g: {type: Adam, lr: 5.0e-4, weight_decay: 0, betas: [0.9, 0.9]}
  scheduler: {type: MultiStepLR, milestones: [50, 80], gamma: 0.5}
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
val:
  val_freq: 50
  save_img: false
  metrics:
    psnr: {type: calculate_psnr, crop_border: 2, test_y_channel: true, better: higher}
logger: {print_freq: 10, save_checkpoint_freq: 50, use_tb_logger: true, wandb: {project: ~}}
dist_params: {backend: nccl, port: 29500}
"""


@pytest.fixture
def save_zeros() -> Callable[..., None]:
    """Save a checkpoint of zeros for a ``network_g``."""

    def save(path: Path, network: Mapping[str, Any], keys: Sequence[str] = ("params", "params_ema")) -> None:
        with torch.device("meta"):
            state = build_network(dict(network)).state_dict()
        weights = {name: torch.zeros(value.shape) for name, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict.fromkeys(keys, weights), path)

    return save


@pytest.fixture
def make_data(save_zeros: Callable[..., None]) -> Callable[..., None]:
    """Make, in the working directory, black images and weights of zeros for the data that options name."""

    def make(opt: Mapping[str, Any], images: int = 8) -> None:
        for dataset in opt["datasets"].values():
            hr = dataset.get("gt_size", 8 * opt["scale"])
            template = dataset.get("filename_tmpl", "{}")
            make_folder(dataset.get("dataroot_gt"), "{}", images, hr)
            make_folder(dataset.get("dataroot_lq"), template, images, hr // opt["scale"])
            for source in dataset.get("sources", ()):
                make_folder(source["dataroot_gt"], "{}", images, hr)
        for key, value in opt["path"].items():
            if key.startswith("pretrain_network") and value is not None and value not in model_list():
                # As it is named, so it was trained: _x2_.
                scale = re.search(r"_x(\d)_", value)
                key = opt["network_g"].keys() & {"upscaling_factor", "upscale", "up_scale"}
                save_zeros(Path(value), {**opt["network_g"], key.pop(): int(scale[1])})

    def make_folder(root: str | None, template: str, images: int, side: int) -> None:
        if root is None:
            return
        folder = Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.suffix == ".lmdb":
            (folder / "data.mdb").touch()
            lines = (f"{i}.png ({side},{side},3) 1\n" for i in range(images))
            (folder / "meta_info.txt").write_text("".join(lines))
        else:
            image = io.BytesIO()
            Image.new("RGB", (side, side)).save(image, "PNG")
            for i in range(images):
                (folder / f"{template.format(i)}.png").write_bytes(image.getvalue())

    return make


@pytest.fixture
def sound_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_data: Callable[..., None]
) -> dict[str, Any]:
    """Options without a mistake, for BasicSR's own classes; their data lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    opt = yaml.safe_load(SOUND)
    make_data(opt)
    return opt
