"""Every shipped option file builds its model, and the model takes a step or upscales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.models import build_model

from esc_basicsr.options.loader import load_options
from esc_basicsr.options.recipes import option_files
from esc_basicsr.options.schema import filled
from esc_basicsr.weights.shipped import model_list

OPTIONS = Path(__file__).parents[2] / "options"
FILES = sorted(map(str, option_files()))
LR_SIZE = 16  # what OmniSR pools needs as many


@pytest.fixture(params=FILES)
def option_file(request, tmp_path, monkeypatch) -> tuple[dict[str, Any], bool]:
    """Options as BasicSR hands them to a model, in a folder with the checkpoint that they start from."""
    monkeypatch.chdir(tmp_path)
    is_train = request.param.startswith("train")
    opt = filled(load_options(OPTIONS / request.param))
    opt.update(is_train=is_train, num_gpu=0, dist=False, rank=0, world_size=1)
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
    gt = torch.rand(2, 3, LR_SIZE * scale, LR_SIZE * scale)
    model.feed_data({"lq": torch.rand(2, 3, LR_SIZE, LR_SIZE), "gt": gt})
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
