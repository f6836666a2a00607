"""Option files that are sound, with the data they name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

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
def make_data() -> Callable[..., None]:
    """Make, in the working directory, empty stand-ins for the data that options name."""

    def make(opt: Mapping[str, Any], images: int = 8) -> None:
        for dataset in opt["datasets"].values():
            template = dataset.get("filename_tmpl", "{}")
            roots = [(dataset.get("dataroot_gt"), "{}"), (dataset.get("dataroot_lq"), template)]
            roots += [(source["dataroot_gt"], "{}") for source in dataset.get("sources", ())]
            for root, names in roots:
                if root is not None:
                    make_folder(Path(root), names, images)
        for key, value in opt["path"].items():
            if key.startswith("pretrain_network") and value is not None:
                Path(value).parent.mkdir(parents=True, exist_ok=True)
                Path(value).touch()

    def make_folder(root: Path, template: str, images: int) -> None:
        root.mkdir(parents=True, exist_ok=True)
        if root.suffix == ".lmdb":
            (root / "data.mdb").touch()
            (root / "meta_info.txt").write_text("".join(f"{i}.png (16,16,3) 1\n" for i in range(images)))
        else:
            for i in range(images):
                (root / f"{template.format(i)}.png").touch()

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
