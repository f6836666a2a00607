"""Every shipped option file builds its model, and the model takes a step or upscales."""

import logging
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.models import build_model
from PIL import Image
from tiny_training import write_images
from torchvision.models import vgg

from esc_basicsr.__main__ import main
from esc_basicsr.options.loader import load_options
from esc_basicsr.options.recipes import option_files
from esc_basicsr.options.schema import filled
from esc_basicsr.weights.shipped import model_list

OPTIONS = Path(__file__).parents[2] / "options"
FILES = sorted(file for file in map(str, option_files()) if "ESC-Real" not in file)
LR_SIZE = 16  # what OmniSR pools needs as many


@pytest.fixture(params=FILES)
def option_file(request, tmp_path, monkeypatch) -> tuple[dict[str, Any], bool]:
    """Options as BasicSR hands them to a model, in a folder with the checkpoint that they start from."""
    monkeypatch.chdir(tmp_path)
    is_train = request.param.startswith("train")
    opt = filled(load_options(OPTIONS / request.param))
    opt.update(is_train=is_train, num_gpu=0, dist=False, rank=0, world_size=1)
    if "ESC-XL" in request.param:
        opt["network_g"] |= {"n_blocks": 1, "window_size": 8}  # a minute less
    start = opt["path"]["pretrain_network_g"]
    if start is not None and start not in model_list():
        # training at another scale starts from the ×2 network
        network_g = dict(opt["network_g"])
        if is_train:
            network_g["upscaling_factor"] = 2
        state = build_network(network_g).state_dict()
        Path(start).parent.mkdir(parents=True)
        torch.save({"params": state, "params_ema": state}, start)
    return opt, is_train


def test_shipped_file_builds_and_runs(option_file):
    opt, is_train = option_file
    scale = opt["scale"]
    model = build_model(opt)
    channels = opt["network_g"].get("in_channels", 3)
    gt = torch.rand(2, channels, LR_SIZE * scale, LR_SIZE * scale)
    model.feed_data({"lq": torch.rand(2, channels, LR_SIZE, LR_SIZE), "gt": gt})
    if is_train:
        before = [p.detach().clone() for p in model.net_g.parameters()]
        model.update_learning_rate(1, warmup_iter=opt["train"]["warmup_iter"])
        train = opt["train"]
        first = train["optim_g"]["lr"] / train["warmup_iter"]
        assert model.get_current_learning_rate() == [pytest.approx(first)]
        model.optimize_parameters(1)
        assert any(not torch.equal(p, old) for p, old in zip(model.net_g.parameters(), before, strict=True))
        assert model.get_current_log()["l_pix"] > 0
    model.test()
    assert model.output.shape == gt.shape
    assert model.output.isfinite().all()


SMALL = (
    *("num_gpu=0", "queue_size=1", "gt_size=32", "train:total_iter=1", "val:val_freq=1"),
    *("datasets:train:batch_size_per_gpu=1", "datasets:train:num_worker_per_gpu=0"),
    *("datasets:train:persistent_workers=false", "datasets:train:pin_memory=false", "logger:print_freq=1"),
    *("network_g:n_blocks=1", "network_g:conv_blocks=1", "network_g:dim=16", "network_g:pdim=4"),
    *("logger:save_checkpoint_freq=1", "logger:use_tb_logger=false"),
)


@pytest.mark.parametrize("name", ["ESC-Real_x4_DIV2K", "ESC-RealM_x2_DIV2K"])
def test_stages_for_photographs_train_one_after_the_other(tmp_path, monkeypatch, caplog, name):
    variant, scale, _ = name.split("_")
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", count=2, height=64, width=64)
    (tmp_path / "datasets/DIV2K").mkdir(parents=True)
    (tmp_path / "images/hr.lmdb").rename("datasets/DIV2K/DIV2K_train_HR_sub.lmdb")
    for folder, side in ((f"HR/X{scale[1]}", 64), (f"LR_bicubic/X{scale[1]}", 64 // int(scale[1]))):
        Path("datasets/Set5", folder).mkdir(parents=True)
        suffix = scale if folder.startswith("LR") else ""
        Image.new("RGB", (side, side), "gray").save(f"datasets/Set5/{folder}/a{suffix}.png")
    # with VGG's own weights, but for 0.5 GB that nothing here needs
    features = vgg.make_layers(vgg.cfgs["E"])
    monkeypatch.setattr(vgg, "vgg19", lambda **_: types.SimpleNamespace(features=features))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    Path("checkpoints").mkdir()
    Path("checkpoints/vgg19-dcbb9e9d.pth").touch()
    caplog.set_level(logging.INFO, "basicsr")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("basicsr"), "handlers", [handler])
    for stage, more in (("MSE", ()), ("GAN", ("network_d:num_feat=4",))):
        file = OPTIONS / f"train/{variant}/{name}_{stage}.yml"
        assert main(["train", "-opt", str(file), "--force_yml", *SMALL, *more]) == 0
    log = "\n".join(lines)
    for loss in ("l_pix", "l_g_pix", "l_g_percep", "l_g_gan", "l_d_real", "l_d_fake"):
        assert f"{loss}: " in log
    assert f"Loading {'ESCReal' if scale == 'x4' else 'ESCRealM'} from experiments/{name}_MSE/models" in log
    models = Path("experiments", f"{name}_GAN", "models")
    assert {f"net_{label}_latest.pth" for label in "gd"} <= {file.name for file in models.iterdir()}
    first, last = (
        torch.load(f"experiments/{name}_{stage}/models/net_g_latest.pth")["params_ema"]
        for stage in ("MSE", "GAN")
    )
    assert first.keys() == last.keys() and any(not torch.equal(first[key], last[key]) for key in first)
